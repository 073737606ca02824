"""The tasks: small sets of labelled images or texts, prepared once per process."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, DataCollatorWithPadding, PreTrainedModel  # type: ignore[attr-defined]

from peft_fps.benchmarks.transfer.cells import Setting
from peft_fps.benchmarks.transfer.text_tasks import TextSplit, holds_texts, load_text_model, load_texts
from peft_fps.gradients import TwoViews
from peft_fps.vision.classifiers import interpolates, load_model, load_processor
from peft_fps.vision.labelled_examples import Collate, LabelledExamples
from peft_fps.vision.labelled_images import load_images
from peft_fps.vision.pixels import Collator, ImageSplit, two_views


PARTS = ("train", "validation", "test")
GROUPS = ("natural", "specialised", "structured")
"""VTAB's groups of tasks, in the order of its tables."""


@dataclass(frozen=True)
class Task:
    """A task with its images or tokens as tensors.

    Attributes:
        name: of its folder.
        group: of tasks.
        classes: names of the classes.
        splits: `train`, `validation` and `test`.
        load_base: from a seed to a model with a new output head for the classes.
        collator: from a model to what makes its batches.
        views: what makes two augmented views of an image; None for texts.
    """

    name: str
    group: str
    classes: list[str]
    splits: Mapping[str, LabelledExamples]
    load_base: Callable[[int], PreTrainedModel]
    collator: Callable[[PreTrainedModel], Collate]
    views: Callable[[], TwoViews] | None = None


@lru_cache(maxsize=16)
def load_task(name: str, setting: Setting) -> Task:
    """Load a task's images at the size of the setting, or its texts.

    Raises:
        ValueError: there is no such task.
    """
    folder = Path(setting.tasks) / name
    if holds_texts(folder):
        return _load_text_task(folder, setting)
    data = load_images(str(folder), seed=0)
    processor = load_processor(setting.model, setting.image_size)
    splits = {part: ImageSplit(getattr(data, part), processor) for part in PARTS}
    for part, split in splits.items():
        split.keep(f"{name}, {part}")

    def load_base(seed: int) -> PreTrainedModel:
        return _attending(load_model(setting.model, data.classes, seed, setting.image_size), setting)

    return Task(
        name,
        group_of(folder),
        data.classes,
        splits,
        load_base,
        collator=lambda base: Collator(interpolates(base)),
        views=lambda: two_views(processor),
    )


def _load_text_task(folder: Path, setting: Setting) -> Task:
    """Load a task's texts as tokens of the setting's model."""
    classes = [str(name) for name in _meta(folder).get("classes", [])]
    parts = load_texts(folder, len(classes))
    tokenizer = AutoTokenizer.from_pretrained(setting.model)
    splits = {part: TextSplit(texts, labels, tokenizer) for part, (texts, labels) in parts.items()}
    return Task(
        folder.name,
        group_of(folder),
        classes,
        splits,
        load_base=lambda seed: _attending(load_text_model(setting.model, classes, seed), setting),
        collator=lambda base: DataCollatorWithPadding(tokenizer),
    )


def _attending(model: PreTrainedModel, setting: Setting) -> PreTrainedModel:
    """Return the model with the setting's implementation of attention."""
    if setting.attention != "sdpa":  # which transformers chooses itself where a model has it
        model.set_attn_implementation(setting.attention)
    return model


def group_of(folder: Path) -> str:
    """Return the group that a task's `meta.json` names, `"all"` where there is none.

    Raises:
        ValueError: the file is no JSON.
    """
    group = _meta(folder).get("group")
    return group if isinstance(group, str) else "all"


def _meta(folder: Path) -> dict[str, Any]:
    """Return what a task's `meta.json` says, nothing where there is none or no object."""
    meta = folder / "meta.json"
    if not meta.exists():
        return {}
    try:
        found = json.loads(meta.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{meta} is no JSON, expected an object with the task's group: {error}") from error
    return found if isinstance(found, dict) else {}


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
