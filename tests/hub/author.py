"""Push adapters and merged models, and write down in a folder what they computed."""

import json
from copy import deepcopy
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy
import torch
from huggingface_hub import HfApi
from peft import PeftModel, get_peft_model
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, TrainingArguments

from peft_fps import FPSCallback, FPSConfig
from peft_fps.hub import push_adapter
from tests.support.helpers import config, fill, normal


BASE = files("peft_fps") / "vision" / "default_model"
LABELS = 10


@cache
def _loaded() -> Any:
    torch.manual_seed(0)
    options = {"num_labels": LABELS, "ignore_mismatched_sizes": True, "dtype": torch.float32}
    return AutoModelForImageClassification.from_pretrained(BASE, **options).eval()


def base() -> Any:
    """The embedded tiny ViT, with a head that every process makes alike."""
    return deepcopy(_loaded())


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(normal(4, 3, 32, 32)).logits


def adapted(seed: int) -> PeftModel:
    model = get_peft_model(base(), config(budget=0.0077)).eval()
    fill(model, seed=seed, scale=0.05)
    return model


def train(folder: Path) -> Trainer:
    """Train for two steps, with a push at the first and one at the end."""
    examples: Any = [{"pixel_values": image, "labels": n % LABELS} for n, image in enumerate(normal(8, 3, 32, 32))]
    arguments = TrainingArguments(
        str(folder / "run"),
        use_cpu=True,
        max_steps=2,
        save_steps=1,
        per_device_train_batch_size=4,
        eval_strategy="steps",
        eval_steps=2,
        learning_rate=1e-3,
        report_to=[],
        disable_tqdm=True,
        push_to_hub=True,
        hub_model_id="alice/trained",
    )
    trainer = Trainer(
        get_peft_model(base(), FPSConfig()),
        arguments,
        train_dataset=examples,
        eval_dataset=examples,
        compute_metrics=lambda p: {"accuracy": float((numpy.argmax(p.predictions, 1) == p.label_ids).mean())},
        callbacks=[FPSCallback()],
    )
    trainer.train()
    trainer.push_to_hub()
    return trainer


def main(notes: str) -> None:
    folder = Path(notes)
    model, expected, commits = adapted(seed=1), {}, {}
    expected["first"] = logits(model)
    commits["first"] = model.push_to_hub("alice/digits").oid
    HfApi().create_tag("alice/digits", tag="v1", revision=commits["first"])
    fill(model, seed=2, scale=0.05)
    expected["second"] = logits(model)
    commits["second"] = push_adapter(model, "alice/digits").oid

    model.add_adapter("cats", config(per_neuron=1))
    fill(model, seed=3, scale=0.05)
    fill(model, "cats", seed=4, scale=0.05)
    expected["secret"] = logits(model)
    model.set_adapter("cats")
    expected["cats"] = logits(model)
    for _ in range(2):  # a card within a folder is brought up to date like any other
        push_adapter(model, "alice/secret", private=True, picture=False)
    push_adapter(model, "alice/damaged", selected_adapters=["default"], picture=False)

    model.delete_adapter("cats")
    fill(model, seed=5, scale=0.05)
    expected["branch"] = logits(model)
    commits["branch"] = push_adapter(model, "alice/digits", revision="trial", picture=False).oid
    gone = push_adapter(model, f"{HfApi().whoami()['name']}/gone", picture=False)
    HfApi().delete_repo(gone.repo_url.repo_id)
    merged = model.merge_and_unload()
    expected["merged"] = logits(merged)
    merged.push_to_hub("alice/merged")
    AutoImageProcessor.from_pretrained(BASE).push_to_hub("alice/merged")

    trainer = train(folder)
    expected["trained"] = logits(trainer.model)
    measured = [entry for entry in trainer.state.log_history if "eval_accuracy" in entry]
    torch.save(expected, folder / "expected.pt")
    (folder / "author.json").write_text(json.dumps({"commits": commits, "measured": measured}))
