"""Replace a saved adapter so that its folder holds the old one or the new one, wherever the process is killed.

PEFT's `save_pretrained` writes `adapter_model.safetensors` and `adapter_config.json` in place, one after the other. A
process that is killed between the two leaves files that loading refuses, and the old adapter is lost. This module
writes everything into a folder beside the old one, and then lets the two folders change places:

    .adapter.saving    old adapter's other files, new adapter      (while writing)
    adapter            old adapter

On Linux that is one step of the kernel. Elsewhere, and on file systems without that step, it takes two renames. A
process that is killed between them leaves the old adapter as `.adapter.previous`; the next `save_adapter`, or
`recover_adapter`, puts it back. A machine that loses power may lose both, since nothing is forced onto the disk.
"""

import ctypes
import os
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peft import PeftMixedModel, PeftModel
from peft.utils import CONFIG_NAME

from peft_fps.checkpoint.folder import PICKLED_WEIGHTS, WEIGHTS


REWRITTEN = (CONFIG_NAME, WEIGHTS, PICKLED_WEIGHTS, "README.md")
"""Files that PEFT writes in place."""

AT_FDCWD, RENAME_EXCHANGE = -100, 2


def save_adapter(model: Any, folder: str | os.PathLike[str], **options: Any) -> None:
    """Save adapters as `model.save_pretrained` does, but replace an old adapter only when all files are written.

    Other files in the folder stay. Only one process at a time may save to a folder.

    Args:
        model: a `PeftModel`, a `PeftMixedModel` with FPS and LoRA adapters, or another object with `save_pretrained`.
        folder: where to save; it is created if missing, and a link to a folder stays a link.
        options: arguments of `save_pretrained`, for instance `selected_adapters`.

    Raises:
        ValueError: `folder` is a file, is the working directory, or contains it.
    """
    if isinstance(model, PeftMixedModel):
        model = _saved_by_peft(model)
    if not options.get("is_main_process", True):  # writes nothing, but may have to take part in gathering
        with TemporaryDirectory() as nowhere:
            model.save_pretrained(nowhere, **options)
        return
    target = Path(os.path.realpath(folder))
    if target.exists() and not target.is_dir():
        raise ValueError(f"{folder} is a file, expected a folder to save the adapter in. Give another name.")
    if Path.cwd().is_relative_to(target):
        raise ValueError(
            f"{folder} is the working directory or holds it, expected a folder that another one may replace. Save to "
            "a folder of its own."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    recover_adapter(target)
    written = _beside(target, "saving")
    shutil.rmtree(written, ignore_errors=True)  # of a process that was killed
    try:
        if target.exists():
            shutil.copytree(target, written, symlinks=True, copy_function=_link)
        model.save_pretrained(str(written), **options)
        _replace(target, written)
    finally:
        shutil.rmtree(written, ignore_errors=True)


def recover_adapter(folder: str | os.PathLike[str]) -> bool:
    """Put back the old adapter if a process was killed while `save_adapter` replaced it.

    Only file systems that cannot exchange two folders in one step need it.

    Args:
        folder: of the adapter, as given to `save_adapter`.

    Returns:
        Whether there was an adapter to put back.
    """
    target = Path(os.path.realpath(folder))
    previous = _beside(target, "previous")
    if not previous.exists():
        return False
    if target.exists():
        shutil.rmtree(previous)
        return False
    os.rename(previous, target)
    return True


def _saved_by_peft(model: PeftMixedModel) -> PeftModel:
    """Return a `PeftModel` with the adapters of a mixed model, whose class refuses to save.

    PEFT itself loads an adapter of a mixed model by the code of `PeftModel`; this is the way back.
    """
    view = PeftModel.__new__(PeftModel)
    first = next(iter(model.peft_config))
    view.__dict__.update(vars(model), _is_prompt_learning=False, active_adapter=first)
    return view


def _replace(target: Path, written: Path) -> None:
    """Put the folder `written` in the place of `target`; an old `target` is at `written` afterwards, or deleted."""
    if not target.exists():
        os.rename(written, target)
    elif not _exchange(target, written):
        previous = _beside(target, "previous")
        os.rename(target, previous)
        try:
            os.rename(written, target)
        except OSError:
            os.rename(previous, target)
            raise
        shutil.rmtree(previous)


def _exchange(first: Path, second: Path) -> bool:
    """Let two folders change places in one step.

    Returns:
        False where the system cannot do that, and nothing has changed.
    """
    if sys.platform != "linux":
        return False
    exchange = getattr(ctypes.CDLL(None), "renameat2", None)
    paths = os.fsencode(first), os.fsencode(second)
    return exchange is not None and exchange(AT_FDCWD, paths[0], AT_FDCWD, paths[1], RENAME_EXCHANGE) == 0


def _beside(target: Path, role: str) -> Path:
    """Return the path of the hidden folder with a role beside the target: `.adapter.saving` for the role `saving`."""
    return target.with_name(f".{target.name}.{role}")


def _link(source: str, destination: str) -> None:
    """Link a file if PEFT will not write to it, and copy it otherwise."""
    if Path(source).name not in REWRITTEN:
        try:
            os.link(source, destination)
            return
        except OSError:  # the file system has no links
            pass
    shutil.copy2(source, destination)
