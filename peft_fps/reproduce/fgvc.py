"""FGVC as VPT splits it: `train.json`, `val.json` and `test.json`, each from image path to class id."""

import json
from pathlib import Path
from typing import Any

from peft_fps.reproduce.listings import Row, require


FILES = {"train": "train.json", "validation": "val.json", "test": "test.json"}
IMAGE_FOLDERS = ("", "images", "Images")
"""Where image paths may begin, below the folder of the task."""


def read_fgvc(folder: Path, train_on_all: bool) -> dict[str, list[Row]]:
    """Return the rows of the splits, class ids numbered in ascending order; `train_on_all` joins the first two.

    Raises:
        ValueError: a file is missing or is not an object from path to class id, or a test image is of a class that
            has no other images.
    """
    require(folder, list(FILES.values()))
    listed = {split: _read(folder / name) for split, name in FILES.items()}
    trained = {label for split in ("train", "validation") for label in listed[split].values()}
    for path, label in listed["test"].items():
        if label not in trained:
            raise ValueError(
                f"{folder / FILES['test']}, {path!r}: the class id is {label}, expected one of the {len(trained)} of "
                "train.json and val.json."
            )
    index = {label: position for position, label in enumerate(sorted(trained))}
    first = next(path for part in listed.values() for path in part)
    base = next((folder / name for name in IMAGE_FOLDERS if (folder / name / first).is_file()), folder)
    rows = {
        split: [Row(base / path, index[label], f"{folder / FILES[split]}, {path!r}") for path, label in part.items()]
        for split, part in listed.items()
    }
    if train_on_all:
        rows["train"] += rows.pop("validation")
    return rows


def _read(file: Path) -> dict[str, int]:
    """Return the class ids of a file by image path; raises ValueError for another content."""
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{file} holds {type(content).__name__}, expected an object from image path to class id.")
    labels = {}
    for path, label in content.items():
        if isinstance(label, bool) or not str(label).isdecimal():
            raise ValueError(f"{file}, {path!r}: the class id is {label!r}, expected an integer of at least 0.")
        labels[path] = int(label)
    return labels
