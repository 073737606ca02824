"""A seeded uniform score, the control of comparisons. It is drawn on the CPU, so that all devices have the same."""

import hashlib
from typing import Any

import torch
from torch import Tensor

from peft_fps.importance.importance import Importance, Score
from peft_fps.importance.settings import Settings
from peft_fps.layers.entry_layer import EntryLayer
from peft_fps.selection.calibration_record import CalibrationRecord


STRIPE = 64
"""Rows that are drawn at once."""


def random_scorer(layer: EntryLayer, path: str, seed: int) -> Score:
    """Return uniform scores that depend only on the seed, the module path, and the position in the weight.

    Args:
        layer: gives shape and device.
        path: module path of the layer.
        seed: seed of the scores.
    """

    def score(first: int, last: int) -> Tensor:
        begin = first // STRIPE * STRIPE
        stripes = [_stripe(seed, path, row, layer.shape.inputs) for row in range(begin, last, STRIPE)]
        device = next(iter(layer.fps_columns.values())).device
        return torch.cat(stripes)[first - begin : last - begin].to(device)

    return score


def _stripe(seed: int, path: str, row: int, inputs: int) -> Tensor:
    """Return the scores of the `STRIPE` rows from `row` on, `(STRIPE, inputs)` float32 on the CPU."""
    digest = hashlib.sha256(f"{seed} {path} {row}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.rand(STRIPE, inputs, generator=generator, dtype=torch.float32, device="cpu")


def _scorer(layer: EntryLayer, path: str, config: Settings, evidence: Any) -> Score:
    """Return random scores of a layer, with the seed of the config; see `Importance.scorer`."""
    return random_scorer(layer, path, config.seed)


def _text(record: CalibrationRecord) -> str:
    """Return the description of the score for reports."""
    return "chance" if record.seed is None else f"chance (seed {record.seed})"


RANDOM = Importance(name="random", needs="nothing", help="a control", text=_text, scorer=_scorer)
