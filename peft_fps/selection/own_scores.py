"""Scores that a user brings, checked before anything is ranked by them."""

from typing import Any

import torch
from torch import Tensor

from peft_fps.selection.budget_allocation import LayerShape


def checked_scores(path: str, scores: Any, shape: LayerShape) -> Tensor:
    """Return a module's scores as float32, ready to be ranked.

    Args:
        path: of the module, for messages.
        scores: what was given, expected as `(neurons, inputs)`.
        shape: of the module.

    Raises:
        TypeError: they are no floating tensor.
        ValueError: they have another shape, are negative, or not finite in float32.
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
    return ranked.abs()  # -0.0 has a sign that ranking would see
