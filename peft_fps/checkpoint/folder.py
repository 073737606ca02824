"""Checks of an adapter folder that are possible before a model is touched."""

from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open


WEIGHTS = "adapter_model.safetensors"
PICKLED_WEIGHTS = "adapter_model.bin"


def check_folder(folder: Path, whole_modules: Iterable[str]) -> None:
    """Refuse a folder whose adapter file is pickled, unreadable, or lacks a module that is saved whole.

    A folder without any adapter file passes: it holds a config alone.

    Args:
        folder: where `adapter_config.json` lies.
        whole_modules: names of the modules the config says are saved whole (`modules_to_save`).

    Raises:
        ValueError: names the file, what was found and what to do.
    """
    weights = folder / WEIGHTS
    if not weights.exists():
        if (folder / PICKLED_WEIGHTS).exists():
            raise ValueError(
                f"{folder / PICKLED_WEIGHTS} is a pickled adapter, expected {WEIGHTS}. Save the adapter with "
                "safe_serialization=True."
            )
        return
    try:
        with safe_open(weights, framework="pt") as file:
            keys = list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{weights} is not a readable safetensors file: {error}. Fetch or save it again.") from error
    for name in whole_modules:
        if not any(f".{name}." in f".{key}" for key in keys):
            raise ValueError(
                f"{weights} holds no tensor of {name}, expected its weights, since modules_to_save names it. The file "
                "is incomplete; fetch or save it again."
            )
