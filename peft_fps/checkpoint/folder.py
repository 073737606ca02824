"""Checks of an adapter folder that are possible before a model is touched."""

from collections.abc import Iterable
from pathlib import Path

from peft.utils import CONFIG_NAME
from safetensors import SafetensorError, safe_open

from peft_fps.checkpoint.digest import tensors_digest
from peft_fps.checkpoint.encoding import TENSORS


WEIGHTS = "adapter_model.safetensors"
PICKLED_WEIGHTS = "adapter_model.bin"
PEFT_PREFIX = "base_model.model."


def is_pickled(folder: Path) -> bool:
    """Whether the folder holds a pickled adapter file and no safetensors."""
    return (folder / PICKLED_WEIGHTS).exists() and not (folder / WEIGHTS).exists()


def check_folder(folder: Path, whole_tensors: Iterable[str], pickled: bool, digest: str | None = None) -> None:
    """Refuse a folder whose adapter file is unexpectedly pickled, unreadable, incomplete, or not the config's own.

    A folder without any adapter file passes: it holds a config alone.

    Args:
        folder: where `adapter_config.json` lies.
        whole_tensors: tensors of modules saved whole (`modules_to_save`), as the config lists them.
        pickled: whether the config says that the adapter was pickled on purpose.
        digest: of the file's sparse tensors as the config says, see `tensors_digest`; None proves nothing.

    Raises:
        ValueError: names the file, what was found and what to do.
    """
    weights = folder / WEIGHTS
    if is_pickled(folder) and not pickled:
        raise ValueError(
            f"{folder / PICKLED_WEIGHTS} is a pickled adapter, expected {WEIGHTS}. Save the adapter with "
            "safe_serialization=True, or fetch it again."
        )
    if not weights.exists():
        return
    try:
        with safe_open(weights, framework="pt") as file:
            keys = list(file.keys())
            read = {key: file.get_tensor(key) for key in keys if digest is not None and key.endswith(TENSORS)}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{weights} is not a readable safetensors file: {error}. Fetch or save it again.") from error
    names = {key.removeprefix(PEFT_PREFIX) for key in keys}
    missing = [name for name in whole_tensors if name not in names]
    if missing:
        raise ValueError(
            f"{weights} lacks {', '.join(missing)}, expected every tensor of the modules that are saved whole. The "
            "file is incomplete; fetch or save it again."
        )
    if digest is not None and (found := tensors_digest(read)) != digest:
        raise ValueError(
            f"{weights} holds tensors with the digest {found[:12]}, expected {digest[:12]} as {CONFIG_NAME} says. The "
            "file is damaged, or saving was interrupted between the two files; fetch or save the adapter again. If "
            "the tensors were edited on purpose, set tensors_sha256 in the config's record to null."
        )
