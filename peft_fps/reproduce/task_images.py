"""The images of a task: from the benchmark's own files, another folder, or the Hub."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from datasets import concatenate_datasets

from peft_fps.reproduce import fgvc, vtab
from peft_fps.reproduce.listings import Row, as_images, check_rows, task_folder
from peft_fps.reproduce.recipes import Task
from peft_fps.vision.labelled_images import LabelledImages, load_images


logger = logging.getLogger(__name__)

Reader = Callable[[Path, bool], dict[str, list[Row]]]

LAYOUTS: dict[str, tuple[Reader, tuple[str, ...]]] = {
    "vtab-1k": (vtab.read_vtab, (*vtab.FILES.values(), vtab.ALL)),
    "fgvc": (fgvc.read_fgvc, tuple(fgvc.FILES.values())),
}
"""By benchmark: what reads its files, and their names."""


@dataclass(frozen=True)
class TaskData:
    """The splits of a task.

    Attributes:
        train: training images.
        validation: images to choose the epoch by; None if they are among the training images.
        test: test images.
        classes: names of the classes.
        source: the folder whose files list the images, or what was given as data.
    """

    train: LabelledImages
    validation: LabelledImages | None
    test: LabelledImages
    classes: list[str]
    source: str

    def first(self, images: int) -> "TaskData":
        """Return the first images of each split."""

        def cut(split: LabelledImages) -> LabelledImages:
            return split.select(list(range(min(images, len(split)))))

        validation = None if self.validation is None else cut(self.validation)
        return replace(self, train=cut(self.train), validation=validation, test=cut(self.test))


def load_task(
    data: str,
    task: Task,
    seed: int,
    train_on_all: bool = False,
    image_column: str | None = None,
    label_column: str | None = None,
) -> TaskData:
    """Load a task; a number of classes other than the recipe's is logged as a warning.

    Args:
        data: a folder with the benchmark's files, or with one subfolder of the task's name that has them; or whatever
            `peft_fps.vision.labelled_images.load_images` takes.
        task: whose images these are.
        seed: of splits that are drawn where a data set lacks them.
        train_on_all: train on the validation images too.
        image_column: as in `load_images`; of no effect on the benchmark's files.
        label_column: likewise.

    Raises:
        ValueError: there is no such data, or it cannot be used; says what was looked for and what was found.
    """
    read, names = LAYOUTS[task.benchmark]
    folder = task_folder(data, (task.name, *task.folders), names)
    if folder is not None:
        rows = read(folder, train_on_all)
        classes = [str(index) for index in range(check_rows(rows, task.classes))]
        splits = {split: as_images(part) for split, part in rows.items()}
        loaded = TaskData(splits["train"], splits.get("validation"), splits["test"], classes, str(folder))
    else:
        loaded = _other(data, names, seed, train_on_all, image_column, label_column)
    if len(loaded.classes) != task.classes:
        logger.warning(
            "%s has %d classes, the recipe of %s is for %d",
            *(loaded.source, len(loaded.classes), task.name, task.classes),
        )
    return loaded


def _other(
    data: str,
    names: tuple[str, ...],
    seed: int,
    train_on_all: bool,
    image_column: str | None,
    label_column: str | None,
) -> TaskData:
    """Load images that are not in the benchmark's own files; the arguments are those of `load_task`."""
    try:
        images = load_images(data, seed, image_column, label_column)
    except ValueError as error:
        if not Path(data).expanduser().is_dir():
            raise
        raise ValueError(f"--data is {data!r}, where none of {', '.join(names)} was found; and {error}") from error
    train, validation = images.train, images.validation
    if train_on_all:
        both = concatenate_datasets([train.images, validation.images])
        return TaskData(
            LabelledImages(both, train.labels + validation.labels), None, images.test, images.classes, data
        )
    return TaskData(train, validation, images.test, images.classes, data)
