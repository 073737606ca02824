"""Tasks of other kinds, made of the images of given tasks: orientation, position, number, colour, distance.

A derived image is made of images of one split, and belongs to the same split.
"""

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

from peft_fps.benchmarks.transfer.image_puzzles import (
    MARGIN,
    SHADES,
    SIDE,
    Shade,
    ink,
    rotated,
    scan_strength,
    with_foreign_part,
    with_hues_turned,
    with_objects,
)
from peft_fps.benchmarks.transfer.tasks import PARTS
from peft_fps.vision.labelled_images import LabelledImages, load_images
from peft_fps.vision.output_folders import write_json, written_whole


COUNTS = {"train": 800, "validation": 200, "test": 1000}
"""Images of a derived task, as VTAB-1k has them."""
DIGITS = "digits"
"""The source that is no task: scikit-learn's digits."""

Split = Mapping[str, LabelledImages]
"""One split of every source, by name."""
Make = Callable[[int, int, Split, np.random.Generator], Image.Image]
"""From a class, a row of the first source, the sources and random numbers to an image."""


@dataclass(frozen=True)
class DerivedTask:
    """A task that is made of others.

    Attributes:
        what: one line for `meta.json`.
        classes: their names.
        sources: names of tasks; each row of the first one is used before any is used again.
        make: makes an image. For the same random numbers, classes differ in what the class says alone.
        group: as in VTAB-1k.
    """

    what: str
    classes: tuple[str, ...]
    sources: tuple[str, ...]
    make: Make
    group: str = "structured"


def _image(source: LabelledImages, row: int) -> Image.Image:
    found: Image.Image = source.images[row]["image"]
    return found


def _any(source: LabelledImages, rng: np.random.Generator) -> Image.Image:
    return _image(source, int(rng.integers(len(source))))


def _shade(rng: np.random.Generator) -> Shade:
    red, green, blue = rng.integers(0, SHADES + 1, 3).tolist()
    return red, green, blue


def _rotation(label: int, row: int, sources: Split, rng: np.random.Generator) -> Image.Image:
    """Turn by quarters, and by a little more, so that all are interpolated; a quarter maps JPEG's grid to itself."""
    return rotated(_image(sources["eth80_azimuth"], row), 90 * label + rng.uniform(-15, 15))


def _foreign(label: int, row: int, sources: Split, rng: np.random.Generator) -> Image.Image:
    """Put a part of another image at its own place, somewhere in one of nine cells."""
    source, cell, part = sources["tinyin_size"], SIDE // 3, 28
    other = (row + int(rng.integers(1, len(source)))) % len(source)
    left, top = (int(cell * at + rng.integers(0, cell - part + 1)) for at in (label % 3, label // 3))
    return with_foreign_part(_image(source, row), _image(source, other), (left, top, left + part, top + part))


def _counting(label: int, row: int, sources: Split, rng: np.random.Generator) -> Image.Image:
    """Draw characters of several sizes in different ones of nine cells."""
    cell = (SIDE - 2 * MARGIN) // 3
    objects, boxes, shades = [], [], []
    for place in rng.permutation(9)[: label + 1]:
        side = int(rng.integers(18, cell - 1))
        left, top = (int(MARGIN + cell * at + rng.integers(0, cell - side + 1)) for at in (place % 3, place // 3))
        objects.append(ink(_any(sources["omniglot100"], rng)))
        boxes.append((left, top, left + side, top + side))
        shades.append(_shade(rng))
    return with_objects(_image(sources["rsscn7"], row), objects, boxes, shades)


def _hue(label: int, row: int, sources: Split, rng: np.random.Generator) -> Image.Image:
    """Turn the hues in the middle by quarters of the circle; all pixels go by way of hues and back."""
    return with_hues_turned(_image(sources["flowers102"], row), 64 * label)


NEAREST, STEP, DIGIT_SIDE = 24, 9, 22
"""Distances of two digits: of the first class at least, from class to class, and the digits' own size; in pixels."""


def _distance(label: int, row: int, sources: Split, rng: np.random.Generator) -> Image.Image:
    """Put two digits at a distance in any direction, as a pair anywhere in the picture."""
    distance, angle = NEAREST + STEP * (label + rng.uniform(0.15, 0.85)), rng.uniform(0, 2 * np.pi)
    offset, room = distance * np.array([np.cos(angle), np.sin(angle)]), SIDE - 2 * MARGIN - DIGIT_SIDE
    first = rng.uniform(np.maximum(0, -offset), np.minimum(room, room - offset))
    corners = [MARGIN + np.round(place).astype(int) for place in (first, first + offset)]
    boxes = [(int(x), int(y), int(x) + DIGIT_SIDE, int(y) + DIGIT_SIDE) for x, y in corners]
    digits = [scan_strength(digit) for digit in (_image(sources[DIGITS], row), _any(sources[DIGITS], rng))]
    return with_objects(_any(sources["dtd10"], rng), digits, boxes, [_shade(rng) for _ in digits])


DERIVED: dict[str, DerivedTask] = {
    "eth80_rotation": DerivedTask(
        "how far the disc in the middle of an image is turned, in quarters, within 15 degrees",
        ("0", "90", "180", "270"),
        ("eth80_azimuth",),
        _rotation,
    ),
    "tinyin_foreign_part": DerivedTask(
        "in which of nine cells a part of another image lies, taken from the same place there",
        tuple(f"row {row}, column {column}" for row in range(3) for column in range(3)),
        ("tinyin_size",),
        _foreign,
    ),
    "omniglot_counting": DerivedTask(
        "how many characters are drawn on an aerial photograph, light or dark, of several sizes",
        tuple(str(number) for number in range(1, 9)),
        ("rsscn7", "omniglot100"),
        _counting,
    ),
    "flowers102_hue": DerivedTask(
        "how far hues in the middle are turned, in quarters of the circle; those around it are the photograph's",
        tuple(str(90 * number) for number in range(4)),
        ("flowers102",),
        _hue,
    ),
    "digits_distance": DerivedTask(
        "how far two digits on a texture are apart, in six steps",
        tuple(f"{NEAREST + STEP * number} pixels" for number in range(6)),
        (DIGITS, "dtd10"),
        _distance,
    ),
}
"""All derived tasks by name."""


def derive(tasks: Path, output: Path, seed: int, counts: Mapping[str, int] = COUNTS) -> list[Path]:
    """Make all derived tasks; the same seed and sources give the same bytes.

    Args:
        tasks: folder with the source tasks.
        output: gets a folder for each derived task, with a parquet file per split and `meta.json`.
        seed: of classes, places, angles and so on.
        counts: images by split.

    Returns:
        The folders that were written.

    Raises:
        ValueError: a source task is missing, or a folder to write is there already. Nothing is written then.
    """
    names = sorted({source for task in DERIVED.values() for source in task.sources} - {DIGITS})
    missing = [name for name in names if not (tasks / name).is_dir()]
    if missing:
        raise ValueError(
            f"--tasks is {str(tasks)!r}, which lacks {', '.join(missing)}, expected the tasks {', '.join(names)}."
        )
    taken = [name for name in DERIVED if (output / name).exists()]
    if taken:
        raise ValueError(f"--output is {str(output)!r}, which holds {', '.join(taken)}: choose another folder.")
    sources = {name: load_images(None if name == DIGITS else str(tasks / name), seed=0) for name in (*names, DIGITS)}
    for name, task in DERIVED.items():
        with written_whole(output / name) as folder:
            for part in PARTS:
                split = {source: getattr(sources[source], part) for source in task.sources}
                seeds = [seed, list(DERIVED).index(name), PARTS.index(part)]
                _split(task, split, counts[part], seeds).to_parquet(folder / f"{part}.parquet")
            facts = {"what": task.what, "sources": list(task.sources), "seed": seed, "classes": list(task.classes)}
            write_json(folder / "meta.json", {"task": name, "group": task.group} | facts)
    return [output / name for name in DERIVED]


def _split(task: DerivedTask, sources: Split, count: int, seeds: list[int]) -> Dataset:
    """Return a split of a derived task, with as many images of each class as of any other."""
    rng = np.random.default_rng(seeds)
    labels = rng.permutation(np.arange(count) % len(task.classes)).tolist()
    rows = np.resize(rng.permutation(len(sources[task.sources[0]])), count).tolist()
    images = []
    for number, (label, row) in enumerate(zip(labels, rows, strict=True)):
        with io.BytesIO() as file:
            task.make(label, row, sources, np.random.default_rng([*seeds, number])).save(file, "PNG")
            images.append({"bytes": file.getvalue(), "path": None})
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=list(task.classes))})
    return Dataset.from_dict({"image": images, "label": labels}, features=features)
