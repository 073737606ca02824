"""Save over an old adapter so that the folder holds either the old one or the new one, wherever a process is killed.

PEFT's `save_pretrained` writes `adapter_model.safetensors` and `adapter_config.json` in place, one after the other. A
process that is killed meanwhile leaves files that are refused on loading, but the old adapter is gone. Here everything
is written into a folder beside, and the two folders change places:

    .adapter.saving    old adapter's other files, new adapter      (while writing)
    adapter            old adapter

On Linux that is one step of the kernel. Elsewhere, and on file systems without that step, it takes two renames; a
process that is killed between them leaves the old adapter as `.adapter.previous`, which the next `save_adapter` and
`recover_adapter` put back. Nothing is promised for a machine that loses power: nothing is forced onto the disk.
"""

import ctypes
import os
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peft.utils import CONFIG_NAME

from peft_fps.checkpoint.folder import PICKLED_WEIGHTS, WEIGHTS


REWRITTEN = (CONFIG_NAME, WEIGHTS, PICKLED_WEIGHTS, "README.md")
"""Files that PEFT writes in place."""

AT_FDCWD, RENAME_EXCHANGE = -100, 2


def save_adapter(model: Any, folder: str | os.PathLike[str], **options: Any) -> None:
    """Save adapters as `model.save_pretrained` does, but replace an old adapter only when all is written.

    Other files of the folder stay. One process at a time may save to a folder.

    Args:
        model: a `PeftModel`, or anything else with `save_pretrained`.
        folder: is made if need be; a link to a folder stays one.
        options: arguments of `save_pretrained`, `selected_adapters` for instance.

    Raises:
        ValueError: there is a file of that name, or the folder is the working directory or holds it.
    """
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
    """Put back an adapter that `save_adapter` was killed over, between two renames; returns whether there was one.

    Only file systems that cannot exchange two folders in one step ever need it.
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


def _replace(target: Path, written: Path) -> None:
    """Put the folder `written` in the place of `target`; an old one is `written` afterwards, or gone."""
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
    """Let two folders change places in one step; False where the system cannot."""
    if sys.platform != "linux":
        return False
    exchange = getattr(ctypes.CDLL(None), "renameat2", None)
    paths = os.fsencode(first), os.fsencode(second)
    return exchange is not None and exchange(AT_FDCWD, paths[0], AT_FDCWD, paths[1], RENAME_EXCHANGE) == 0


def _beside(target: Path, role: str) -> Path:
    return target.with_name(f".{target.name}.{role}")


def _link(source: str, destination: str) -> None:
    """Give a file a second name if it is not about to be written to, else copy it."""
    if Path(source).name not in REWRITTEN:
        try:
            os.link(source, destination)
            return
        except OSError:  # the file system has no links
            pass
    shutil.copy2(source, destination)
