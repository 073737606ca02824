"""The files of an adapter's folder, and what is checked about them before a model is touched."""

from collections.abc import Iterable
from pathlib import Path

from peft.utils import CONFIG_NAME

from peft_fps.checkpoint.digest import tensors_digest
from peft_fps.checkpoint.encoding import PEFT_PREFIX, TENSORS
from peft_fps.checkpoint.safetensors_file import open_safetensors


WEIGHTS = "adapter_model.safetensors"
PICKLED_WEIGHTS = "adapter_model.bin"


def is_pickled(folder: Path) -> bool:
    """Return whether the folder holds a pickled adapter file and no safetensors."""
    return (folder / PICKLED_WEIGHTS).exists() and not (folder / WEIGHTS).exists()


def check_folder(folder: Path, whole_tensors: Iterable[str], pickled: bool, digest: str | None = None) -> None:
    """Check that the adapter file is safetensors, can be read, is complete, and belongs to the config beside it.

    A folder without an adapter file passes, since it may hold a config alone.

    Args:
        folder: where `adapter_config.json` lies.
        whole_tensors: names of the tensors of modules that are saved whole (`modules_to_save`), as the config lists
            them.
        pickled: whether the config says that the adapter was pickled on purpose. A pickled file is not opened here.
        digest: of the file's sparse tensors as the config says, see `tensors_digest`. None skips this check.

    Raises:
        ValueError: names the file, what was found, what was expected and what to do.
    """
    weights = folder / WEIGHTS
    if is_pickled(folder) and not pickled:
        raise ValueError(
            f"{folder / PICKLED_WEIGHTS} is a pickled adapter, expected {WEIGHTS}. Save the adapter with "
            "safe_serialization=True, or fetch it again."
        )
    if not weights.exists():
        return
    with open_safetensors(weights) as file:
        keys = list(file.keys())
        sparse = {key: file.get_tensor(key) for key in keys if digest is not None and key.endswith(TENSORS)}
    names = {key.removeprefix(PEFT_PREFIX) for key in keys}
    missing = [name for name in whole_tensors if name not in names]
    if missing:
        raise ValueError(
            f"{weights} lacks {', '.join(missing)}, expected every tensor of the modules that are saved whole. The "
            "file is incomplete; fetch or save it again."
        )
    if digest is not None and (found := tensors_digest(sparse)) != digest:
        raise ValueError(
            f"{weights} holds tensors with the digest {found[:12]}, expected {digest[:12]} as {CONFIG_NAME} says. The "
            "file is damaged, or saving was interrupted between the two files; fetch or save the adapter again. If "
            "the tensors were edited on purpose, set tensors_sha256 in the config's record to null."
        )
