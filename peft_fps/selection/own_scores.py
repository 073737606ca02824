"""Checks of scores that a user computes, before they rank entries."""

from typing import Any

import torch
from torch import Tensor

from peft_fps.selection.budget_allocation import LayerShape


def checked_scores(path: str, scores: Any, shape: LayerShape) -> Tensor:
    """Check a module's scores and return them as float32 without gradient, `(neurons, inputs)`.

    Args:
        path: path of the module, for messages.
        scores: what the user gave.
        shape: shape of the module's weight.

    Raises:
        TypeError: the scores are no floating tensor.
        ValueError: the scores have another shape, are negative, or are not finite in float32.
    """
    expected = f"a floating tensor of shape ({shape.neurons}, {shape.inputs})"
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        kind = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"{path}: found scores of type {kind}, expected {expected}.")
    if scores.shape != (shape.neurons, shape.inputs):
        raise ValueError(f"{path}: found scores of shape {tuple(scores.shape)}, expected {expected}.")
    ranked = scores.detach().to(torch.float32)
    if not bool(torch.isfinite(ranked).all()) or bool((ranked < 0).any()):
        raise ValueError(
            f"{path}: found scores that are negative, NaN or infinite in float32, expected finite ones from 0 on. "
            "Take magnitudes, or shift and scale them."
        )
    return ranked.abs()  # ranking compares bit patterns, and the sign of -0.0 is one
