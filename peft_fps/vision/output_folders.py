"""Output folders that are written whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp


def check_output(output: Path, overwrite: bool, inputs: tuple[Path, ...] = ()) -> None:
    """Refuse an output folder that holds something, unless it is to be overwritten, or in which something needed is.

    Args:
        output: need not exist.
        overwrite: whether the user has said so.
        inputs: files and folders that are read.

    Raises:
        ValueError: names the folder, and what to do.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output is {str(output)!r}, which is a file, expected a folder.")
    if not output.is_dir():
        return
    if any(output.iterdir()) and not overwrite:
        raise ValueError(f"--output is {str(output)!r}, which is not empty: choose another folder or add --overwrite.")
    for needed in (Path.cwd(), *inputs):
        if needed.resolve().is_relative_to(output.resolve()):
            raise ValueError(
                f"--output is {str(output)!r}, which is to be replaced, but is or holds {needed}: choose another "
                "folder."
            )


@contextmanager
def written_whole(output: Path) -> Iterator[Path]:
    """Give a new folder beside `output` that takes its place, whatever is there, when all is written.

    After an error, or if the process is stopped by one, `output` is what it was.
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
