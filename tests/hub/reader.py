"""Load what was pushed, and write down what it computes, or why it was refused."""

import json
import traceback
from pathlib import Path
from typing import Any

import numpy
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageClassification, pipeline

import peft_fps  # noqa: F401 - registers the method
from tests.hub.author import base, logits
from tests.support.helpers import snapshot


def load(name: str, **options: Any) -> torch.Tensor | str:
    """The logits, or the error's text with those of its causes; the model has to be as it was then."""
    model = base()
    before = snapshot(model)
    try:
        return logits(PeftModel.from_pretrained(model, name, **options))
    except Exception as error:
        assert snapshot(model) == before
        return f"{error!r}\n{''.join(traceback.format_exception(error))}"


def predictions(model: Any) -> list[list[tuple[str, float]]]:
    """Labels and scores of a few pictures, by transformers' own pipeline."""
    pixels = numpy.random.default_rng(0).integers(0, 256, (3, 28, 28, 3), dtype=numpy.uint8)
    classify = pipeline("image-classification", model=model, image_processor="alice/merged", device="cpu")
    answers = classify([Image.fromarray(image) for image in pixels], top_k=10)
    return [sorted((guess["label"], guess["score"]) for guess in answer) for answer in answers]


def main(notes: str, name: str, loads: dict[str, dict[str, Any]]) -> None:
    """Write files of that name to the folder `notes`.

    Args:
        notes: the folder.
        name: that of the files.
        loads: by name the arguments of `PeftModel.from_pretrained` after the model.
    """
    folder = Path(notes)
    found = {key: load(**options) for key, options in loads.items()}
    merged = AutoModelForImageClassification.from_pretrained("alice/merged").eval()
    found["merged"] = logits(merged)
    adapter = PeftModel.from_pretrained(base(), "alice/digits", revision="trial").eval()
    inside = base()
    inside.load_adapter("alice/digits", adapter_kwargs={"revision": "trial"})
    torch.save(found, folder / f"{name}.pt")
    models = {"adapter": adapter, "load_adapter": inside, "merged": merged, "merged by name": "alice/merged"}
    (folder / f"{name}.json").write_text(json.dumps({key: predictions(model) for key, model in models.items()}))
