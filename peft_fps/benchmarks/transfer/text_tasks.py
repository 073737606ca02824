"""Tasks of labelled texts: their tokens, and the model with a new output head."""

from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from peft_fps.vision.classifiers import load_whole, renew_head


TRAIN, VALIDATION = 800, 200
"""Texts that are drawn of a larger split, the numbers of VTAB-1k."""
TOKENS = 128
"""Longer texts are cut."""


class TextSplit(torch.utils.data.Dataset[dict[str, Any]]):
    """A split as examples of what the tokenizer gives, lists of tokens, and `labels`, a class index.

    Args:
        texts: the texts.
        labels: their class indices.
        tokenizer: of the model.
    """

    def __init__(self, texts: list[str], labels: list[int], tokenizer: Any) -> None:
        self.labels: Tensor = torch.tensor(labels)
        self._tokens = tokenizer(texts, truncation=True, max_length=TOKENS)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {key: values[row] for key, values in self._tokens.items()} | {"labels": int(self.labels[row])}


def holds_texts(folder: Path) -> bool:
    """Return whether a task's folder holds parquet files with a column `text`."""
    file = folder / "train.parquet"
    return file.is_file() and "text" in pyarrow.parquet.read_schema(file).names


def load_texts(folder: Path, classes: int) -> dict[str, tuple[list[str], list[int]]]:
    """Return the texts and class indices of the splits `train`, `validation` and `test`.

    Of training and validation so many are drawn as VTAB-1k has, the same ones each time. Where there is no split for
    validation, its texts are drawn from those of training that are left over.

    Args:
        folder: holds `train.parquet`, `test.parquet` and perhaps `validation.parquet` with the columns `text` and
            `label`, an index of a class.
        classes: number of classes, the length of `classes` in the task's `meta.json`.

    Raises:
        ValueError: there are no classes, too few texts, no labels, or labels of other classes.
    """
    files = {part: folder / f"{part}.parquet" for part in ("train", "validation", "test")}
    there = {part: str(file) for part, file in files.items() if file.is_file()}
    rows: dict[str, list[tuple[str, int]]] = {}
    for part, file in there.items():
        data = Dataset.from_parquet(file)  # alone, since columns may differ
        found = sorted(set(data["label"]), key=str) if "label" in data.column_names else []
        if not found or any(label not in range(classes) for label in found):
            raise ValueError(
                f"{file} has the columns {data.column_names} and the labels {found[:5]}, expected the column "
                f"`label` with class indices below {classes}, the number of `classes` in meta.json."
            )
        drawn = data if part == "test" else data.shuffle(seed=0)
        rows[part] = list(zip(drawn["text"], drawn["label"], strict=True))
    train, held = rows["train"][:TRAIN], rows.get("validation", rows["train"][TRAIN:])[:VALIDATION]
    if "test" not in rows or len(train) < TRAIN or len(held) < VALIDATION:
        raise ValueError(
            f"{folder} holds the splits {sorted(there)}, {len(train)} texts to train on and {len(held)} to validate, "
            f"expected a split for tests, and at least {TRAIN} and {VALIDATION} texts."
        )
    chosen = {"train": train, "validation": held, "test": rows["test"]}
    return {part: ([text for text, _ in each], [label for _, label in each]) for part, each in chosen.items()}


def load_text_model(name: str, classes: list[str], seed: int) -> PreTrainedModel:
    """Load a text model in float32 with a new output layer for the classes.

    Args:
        name: a folder, or `owner/name` on the Hub.
        classes: names of the classes.
        seed: the same seed gives the same output layer.

    Raises:
        ValueError: there is no such model, or weights other than the output head's are missing.
    """
    model = load_whole(name, classes, AutoModelForSequenceClassification)
    renew_head(model, seed)
    return model
