"""Output folders: whether they are free, how they are written whole or not at all, and plain data in them."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import Any


RESULTS, ADAPTER, MERGED, BASE, PICTURE = "results.json", "adapter", "merged", "base", "training.png"
"""What a fine-tuning writes to its output folder."""


def clear_results(output: Path) -> None:
    """Remove what an earlier fine-tuning left in an output folder, and nothing else."""
    for name in (ADAPTER, MERGED, BASE):
        shutil.rmtree(output / name, ignore_errors=True)
    for name in (RESULTS, PICTURE):
        (output / name).unlink(missing_ok=True)


def check_free(output: Path, overwrite: bool) -> None:
    """Check that an output folder is empty, or may be written to all the same.

    Args:
        output: need not exist.
        overwrite: whether the user has asked for it.

    Raises:
        ValueError: it is a file, or holds something and `overwrite` is off.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output is {str(output)!r}, which is a file, expected a folder.")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise ValueError(f"--output is {str(output)!r}, which is not empty: choose another folder or add --overwrite.")


def check_output(output: Path, overwrite: bool, inputs: tuple[Path, ...] = ()) -> None:
    """Check that an output folder may be replaced as a whole.

    Args:
        output: need not exist.
        overwrite: whether the user has asked for it.
        inputs: files and folders that are read.

    Raises:
        ValueError: as `check_free`, or the folder is or holds one of the inputs or the working folder.
    """
    check_free(output, overwrite)
    if not output.is_dir():
        return
    for needed in (Path.cwd(), *inputs):
        if needed.resolve().is_relative_to(output.resolve()):
            raise ValueError(
                f"--output is {str(output)!r}, which is to be replaced, but is or holds {needed}: choose another "
                "folder."
            )


@contextmanager
def written_whole(output: Path) -> Iterator[Path]:
    """Give a new folder beside `output` that takes its place, whatever is there, when the block ends.

    If the block raises an exception, `output` stays what it was.
    """
    target = Path(os.path.realpath(output))
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        written, previous = beside / "new", beside / "old"
        written.mkdir()
        yield written
        if target.exists():
            os.rename(target, previous)
        os.rename(written, target)
    finally:
        if not target.exists() and (beside / "old").exists():
            os.rename(beside / "old", target)
        shutil.rmtree(beside, ignore_errors=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write plain data to a file, indented by two spaces."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def folder_bytes(folder: Path) -> int:
    """Return the size of all files in a folder and below it, in bytes."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
