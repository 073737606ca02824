"""The tasks: small sets of labelled images, prepared once per process."""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from peft_fps.benchmarks.transfer.cells import Setting
from peft_fps.vision.classifiers import load_processor
from peft_fps.vision.labelled_images import load_images
from peft_fps.vision.pixels import ImageSplit


PARTS = ("train", "validation", "test")
GROUPS = ("natural", "specialised", "structured")
"""VTAB's groups of tasks, in the order of its tables."""


@dataclass(frozen=True)
class Task:
    """A task with its images as tensors.

    Attributes:
        name: of its folder.
        group: of tasks.
        classes: names of the classes.
        splits: `train`, `validation` and `test`.
    """

    name: str
    group: str
    classes: list[str]
    splits: dict[str, ImageSplit]


@lru_cache(maxsize=16)
def load_task(name: str, setting: Setting) -> Task:
    """Load a task's images at the size of the setting.

    Raises:
        ValueError: there is no such task.
    """
    folder = Path(setting.tasks) / name
    data = load_images(str(folder), seed=0)
    processor = load_processor(setting.model, setting.image_size)
    splits = {part: ImageSplit(getattr(data, part), processor) for part in PARTS}
    for part, split in splits.items():
        split.keep(f"{name}, {part}")
    return Task(name, group_of(folder), data.classes, splits)


def group_of(folder: Path) -> str:
    """Return the group that a task's `meta.json` names, `"all"` where there is none.

    Raises:
        ValueError: the file is no JSON.
    """
    meta = folder / "meta.json"
    if not meta.exists():
        return "all"
    try:
        found = json.loads(meta.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{meta} is no JSON, expected an object with the task's group: {error}") from error
    group = found.get("group") if isinstance(found, dict) else None
    return group if isinstance(group, str) else "all"


def task_names(folder: Path) -> list[str]:
    """Return the names of all tasks in a folder, by group and name.

    Raises:
        ValueError: there are none.
    """
    found = [entry for entry in folder.iterdir() if entry.is_dir()] if folder.is_dir() else []
    if not found:
        raise ValueError(f"--tasks is {str(folder)!r}, expected a folder with one folder of labelled images per task.")
    return [entry.name for entry in sorted(found, key=lambda entry: (rank(group_of(entry)), entry.name))]


def rank(group: str) -> tuple[int, str]:
    """Return what groups are ordered by: VTAB's first, in its order."""
    return (GROUPS.index(group) if group in GROUPS else len(GROUPS)), group
