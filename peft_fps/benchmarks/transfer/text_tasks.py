"""Tasks of labelled texts: their tokens, and the model with a new output head."""

import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
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
    return file.is_file() and "text" in Dataset.from_parquet(str(file)).column_names


def load_texts(folder: Path) -> tuple[dict[str, tuple[list[str], list[int]]], list[str]]:
    """Return the texts and class indices of the splits `train`, `validation` and `test`, and the classes' names.

    Of training and validation so many are drawn as VTAB-1k has, the same ones each time. Where there is no split for
    validation, its texts are drawn from those of training that are left over.

    Args:
        folder: holds `train.parquet`, `test.parquet` and perhaps `validation.parquet` with the columns `text` and
            `label`, and `meta.json` with the names of the `classes`.

    Raises:
        ValueError: there are no names of classes, or too few texts.
    """
    files = {part: folder / f"{part}.parquet" for part in ("train", "validation", "test")}
    there = {part: str(file) for part, file in files.items() if file.is_file()}
    rows = {}
    for part, data in load_dataset("parquet", data_files=there).items():
        drawn = data if part == "test" else data.shuffle(seed=0)
        rows[part] = list(zip(drawn["text"], drawn["label"], strict=True))
    train, held = rows["train"][:TRAIN], rows.get("validation", rows["train"][TRAIN:])[:VALIDATION]
    meta = folder / "meta.json"
    classes = json.loads(meta.read_text(encoding="utf-8")).get("classes", []) if meta.exists() else []
    if not classes or "test" not in rows or len(train) < TRAIN or len(held) < VALIDATION:
        raise ValueError(
            f"{folder} holds the splits {sorted(there)}, {len(train)} texts to train on, {len(held)} to validate and "
            f"{len(classes)} names of classes in meta.json, expected a split for tests, at least {TRAIN} and "
            f"{VALIDATION} texts, and the names."
        )
    chosen = {"train": train, "validation": held, "test": rows["test"]}
    return {part: ([text for text, _ in each], [label for _, label in each]) for part, each in chosen.items()}, classes


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
