"""VTAB-1k as NOAH's and SPT's scripts write it: text files with an image path and a label on each line."""

from pathlib import Path

from peft_fps.reproduce.listings import Row, require


FILES = {"train": "train800.txt", "validation": "val200.txt", "test": "test.txt"}
ALL = "train800val200.txt"


def read_vtab(folder: Path, train_on_all: bool) -> dict[str, list[Row]]:
    """Return the rows of the splits; with `train_on_all` there is no validation split.

    Args:
        folder: of the task; image paths are relative to it.
        train_on_all: train on `train800val200.txt` instead of `train800.txt`.

    Raises:
        ValueError: a file is missing or a line is not a path and a class index.
    """
    files = {"train": ALL, "test": FILES["test"]} if train_on_all else FILES
    advice = ""
    if not train_on_all and (folder / ALL).is_file():
        advice = f" {ALL} is there: --train-on-all trains on it, without choosing an epoch."
    require(folder, list(files.values()), advice)
    return {split: _read(folder, name) for split, name in files.items()}


def _read(folder: Path, name: str) -> list[Row]:
    """Return the rows of a file; raises ValueError for a line that is not a path and a class index."""
    rows = []
    for number, line in enumerate((folder / name).read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        path, _, label = line.strip().rpartition(" ")
        where = f"{folder / name}, line {number}"
        if not path or not label.isdecimal():
            raise ValueError(f"{where}: found {line!r}, expected an image path, a space and a class index from 0.")
        rows.append(Row(folder / path.strip(), int(label), where))
    return rows
