"""Labelled images from a folder or the Hub: which splits, which columns, which classes."""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Image, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

from peft_fps.vision.digits import digits
from peft_fps.vision.splits import split_rows


logger = logging.getLogger(__name__)

NAMES = {"train": ("train", "training"), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
"""The splits of a run, and the names they go by."""


@dataclass(frozen=True)
class LabelledImages:
    """A split: a dataset with the column `image`, and the class index of each of its rows."""

    images: Dataset
    labels: list[int]

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, rows: list[int]) -> "LabelledImages":
        """Return the given rows."""
        return LabelledImages(self.images.select(rows), [self.labels[row] for row in rows])


@dataclass(frozen=True)
class ImageData:
    """Three disjoint splits of labelled images and the names of the classes, in the order of the class indices."""

    train: LabelledImages
    validation: LabelledImages
    test: LabelledImages
    classes: list[str]


def load_images(
    data: str | None, seed: int, image_column: str | None = None, label_column: str | None = None
) -> ImageData:
    """Load labelled images; splits that are missing are drawn from those that are there, which is logged.

    Args:
        data: a folder (parquet files, one subfolder per class, or saved by `datasets`), a parquet file, or
            `owner/name` on the Hub, `owner/name:config` where it has several configurations. None means the embedded
            digits.
        seed: seed of the splits that are drawn.
        image_column: name of the column with images; found by type if None.
        label_column: name of the column with labels; found by type and name if None.

    Raises:
        ValueError: there is no such data, or it does not hold labelled images; says what was found.
    """
    splits = _named(_read(data))
    columns = next(iter(splits.values())).features
    image = _choose("image", image_column, columns, {n: f for n, f in columns.items() if _is_image(f)})
    label = _choose("label", label_column, columns, {n: f for n, f in columns.items() if _is_label(f)})
    classes, indices = _classes(columns[label], {name: list(part[label]) for name, part in splits.items()})
    parts = {}
    for name, part in splits.items():
        images = part.select_columns([image]).rename_columns({image: "image"} if image != "image" else {})
        if not isinstance(columns[image], Image):  # written by another library, as bytes
            images = images.cast_column("image", Image())
        parts[name] = LabelledImages(images, indices[name])
    return ImageData(**_complete(parts, seed), classes=classes)


def _read(data: str | None) -> DatasetDict | Dataset:
    """Read a data set as `datasets` gives it; raises ValueError if that is not possible."""
    if data is None:
        return digits()
    path = Path(data).expanduser()
    files = _parquet_files(path)
    if path.is_file() and not files:
        raise ValueError(f"--data is {data!r}, which is neither a folder nor a parquet file.")
    try:
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            return load_from_disk(str(path))
        if files:
            return load_dataset("parquet", data_files=files)
        if path.is_dir():
            return load_dataset("imagefolder", data_dir=str(path))
        name, _, config = data.partition(":")
        return load_dataset(name, config or None)
    except (DatasetsError, OSError, ValueError) as error:
        raise ValueError(f"--data is {data!r}, which could not be read as a data set of images: {error}") from error


def _parquet_files(path: Path) -> dict[str, list[str]]:
    """Return the parquet files by split, as their names tell; all belong to training if none tells."""
    if path.is_file():
        return {"train": [str(path)]} if path.suffix == ".parquet" else {}
    found = sorted(path.rglob("*.parquet"))
    files: dict[str, list[str]] = {}
    unclear: list[str] = []
    for file in found:
        words = re.split(r"[^a-z]+", file.relative_to(path).as_posix().lower())
        for split, aliases in NAMES.items():
            if set(aliases) & set(words):
                files.setdefault(split, []).append(str(file))
                break
        else:
            unclear.append(file.name)
    if files and unclear:
        logger.warning("left out, since their names tell no split: %s", ", ".join(unclear))
    return files or ({"train": [str(file) for file in found]} if found else {})


def _named(dataset: DatasetDict | Dataset) -> dict[str, Dataset]:
    """Return the splits that are there under the names of `NAMES`, training always among them."""
    available: Mapping[str, Dataset] = dataset if isinstance(dataset, Mapping) else {"train": dataset}
    splits = {
        split: next(available[alias] for alias in aliases if alias in available)
        for split, aliases in NAMES.items()
        if set(aliases) & set(available)
    }
    if "train" not in splits and len(available) == 1:
        splits = {"train": next(iter(available.values()))}
    if "train" not in splits:
        raise ValueError(f"--data has the splits {sorted(available)}, expected 'train' among them.")
    empty = [name for name, part in splits.items() if len(part) == 0]
    if empty:
        raise ValueError(f"--data has no rows in the splits {empty}, expected some in each.")
    return splits


def _choose(kind: str, wanted: str | None, columns: Mapping[str, Any], candidates: Mapping[str, Any]) -> str:
    """Return the name of the image or label column: the wanted one, or else the one that names and types tell."""
    found = ", ".join(f"{name} ({_describe(feature)})" for name, feature in columns.items())
    if wanted is not None:
        if wanted not in candidates:
            raise ValueError(f"--{kind}-column is {wanted!r}, which is no column of {kind}s; --data has {found}.")
        return wanted
    usual = [name for name in (kind, f"{kind}s", "img") if name in candidates]
    named_classes = [name for name, feature in candidates.items() if isinstance(feature, ClassLabel)]
    if usual:
        return usual[0]
    for choice in (named_classes, list(candidates)):
        if len(choice) == 1:
            return choice[0]
    expected = "an image column" if kind == "image" else "one column of class labels or integers"
    raise ValueError(f"--data has the columns {found}, expected {expected}; name it with --{kind}-column.")


def _is_image(feature: Any) -> bool:
    """Return whether a column holds images: as such, or as bytes that another library wrote."""
    return isinstance(feature, Image) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})


def _is_label(feature: Any) -> bool:
    """Return whether a column holds class labels or integers."""
    return isinstance(feature, ClassLabel) or (isinstance(feature, Value) and "int" in feature.dtype)


def _describe(feature: Any) -> str:
    """Return the type of a column for messages."""
    return feature.dtype if isinstance(feature, Value) else type(feature).__name__


def _classes(feature: Any, labels: Mapping[str, list[Any]]) -> tuple[list[str], dict[str, list[int]]]:
    """Return the names of the classes, and for each split the class indices."""
    named = isinstance(feature, ClassLabel)
    values = list(range(feature.num_classes)) if named else sorted(set(labels["train"]) - {None})
    for name, part in labels.items():
        strange = sorted({str(label) for label in set(part) - set(values)})
        if strange:
            raise ValueError(f"Split {name!r} has the labels {', '.join(strange[:5])}, which are no training class.")
    if len(values) < 2:
        raise ValueError(f"--data has {len(values)} class, expected at least 2.")
    index = {value: position for position, value in enumerate(values)}
    names = list(feature.names) if named else [str(value) for value in values]
    return names, {name: [index[label] for label in part] for name, part in labels.items()}


def _complete(parts: dict[str, LabelledImages], seed: int) -> dict[str, LabelledImages]:
    """Draw the splits that are missing: test from validation or else training, validation from training."""
    if "test" not in parts:
        source, share = ("validation", 0.5) if "validation" in parts else ("train", 0.2)
        kept, drawn = split_rows(parts[source].labels, share, seed)
        logger.warning(
            "no test split: %d of the %d %s images become the test split (seed %d)",
            *(len(drawn), len(parts[source]), source, seed),
        )
        parts = parts | {source: parts[source].select(kept), "test": parts[source].select(drawn)}
    if "validation" not in parts:
        kept, drawn = split_rows(parts["train"].labels, 0.2, seed)
        logger.warning(
            "no validation split: %d of the %d training images become the validation split (seed %d)",
            *(len(drawn), len(parts["train"]), seed),
        )
        parts = parts | {"train": parts["train"].select(kept), "validation": parts["train"].select(drawn)}
    return parts
