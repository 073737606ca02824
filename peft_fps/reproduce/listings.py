"""Images and labels that files of a benchmark list: where they are, and whether they can be used."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset, Image

from peft_fps.vision.labelled_images import LabelledImages


class Row(NamedTuple):
    """One listed image: its file, its label, and where it is listed."""

    file: Path
    label: int
    where: str


def task_folder(data: str, names: Iterable[str], listings: Iterable[str]) -> Path | None:
    """Return the folder that holds some of the listings: the data folder itself, or below it one of the names."""
    root = Path(data).expanduser()
    wanted = set(listings)
    for folder in (root, *(root / name for name in names)):
        if folder.is_dir() and wanted & {path.name for path in folder.iterdir()}:
            return folder
    return None


def require(folder: Path, listings: Sequence[str], advice: str = "") -> None:
    """Refuse a folder without all of the listings.

    Raises:
        ValueError: says what was looked for and what is there.
    """
    missing = [name for name in listings if not (folder / name).is_file()]
    if missing:
        found = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
        raise ValueError(
            f"{folder} lacks {', '.join(missing)}: looked for {', '.join(listings)}, found {', '.join(found[:12])}"
            f"{', ...' if len(found) > 12 else ''}.{advice}"
        )


def check_rows(splits: Mapping[str, Sequence[Row]], classes: int) -> int:
    """Check images and labels of all splits, the training split among them; returns the number of classes.

    Args:
        splits: the rows by split, labels counted from 0.
        classes: that the recipe expects.

    Raises:
        ValueError: a split is empty, an image is missing, or a label is neither a class of the recipe nor one of
            training.
    """
    limit = max([classes, *(row.label + 1 for row in splits["train"])])
    for split, rows in splits.items():
        if not rows:
            raise ValueError(f"The {split} split lists no images, expected some.")
        for row in rows:
            if not 0 <= row.label < limit:
                raise ValueError(f"{row.where}: the label is {row.label}, expected 0 to {limit - 1}.")
        missing = [row for row in rows if not row.file.is_file()]
        if missing:
            raise ValueError(
                f"{missing[0].where}: there is no image {missing[0].file}; {len(missing)} of the {len(rows)} listed "
                f"images of the {split} split are missing."
            )
    return 1 + max(row.label for rows in splits.values() for row in rows)


def as_images(rows: Sequence[Row]) -> LabelledImages:
    """Return the rows as images that are read from their files when asked for."""
    images = Dataset.from_dict({"image": [str(row.file) for row in rows]}).cast_column("image", Image())
    return LabelledImages(images, [row.label for row in rows])
