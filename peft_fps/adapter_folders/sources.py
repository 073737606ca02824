"""Where an adapter or a selection comes from: a folder, a file, or the Hub."""

from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft.utils import CONFIG_NAME

from peft_fps.checkpoint import WEIGHTS
from peft_fps.vision.locations import check_path


def adapter_folder(name: str, revision: str | None = None) -> Path:
    """Return the local folder of a saved adapter, fetched from the Hub where it is none; files are not looked into.

    Args:
        name: a folder, or `owner/name` on the Hub. `HF_HUB_OFFLINE` is honoured.
        revision: branch, tag or commit on the Hub.

    Raises:
        ValueError: there is no such folder or repository, or no adapter in it.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / CONFIG_NAME).is_file():
            raise ValueError(f"{name} holds no {CONFIG_NAME}, expected the folder of a saved adapter.{_hint(folder)}")
        return folder
    if folder.exists():
        raise ValueError(f"{name} is a file, expected the folder of a saved adapter.")
    check_path("ADAPTER", name)
    try:
        folder = Path(hf_hub_download(name, CONFIG_NAME, revision=revision)).parent
        hf_hub_download(name, WEIGHTS, revision=revision)
    except (OSError, ValueError, EntryNotFoundError) as error:
        raise ValueError(
            f"{name!r} is no local folder, and no FPS adapter of that name could be fetched from the Hub: {error}"
        ) from error
    return folder


def _hint(folder: Path) -> str:
    """Return a sentence that names the folders inside a folder that hold adapters; empty if none does."""
    inside = sorted(str(path.parent.relative_to(folder)) for path in folder.glob(f"*/{CONFIG_NAME}"))
    return f" Adapters are in its folders {', '.join(inside[:5])}." if inside else ""
