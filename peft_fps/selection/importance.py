"""Importance scores of weights: which entries of a weight are worth training.

Every function takes rows of the weight as `(rows, inputs)` and returns float32 scores of that shape, never negative;
the larger score is selected first.
"""

import torch
from torch import Tensor


def weight_times_activation(weight: Tensor, activation: Tensor) -> Tensor:
    """FPS: weight magnitude times the typical magnitude of its input (arXiv 2510.27359, eqs. 2-4).

    Args:
        weight: `(rows, inputs)`.
        activation: `(inputs,)` or `(rows, inputs)`, mean |a| (`norm="l1"`, eq. 3) or root mean square (`"l2"`, eq. 4).
    """
    return magnitude(weight) * activation.float()


def activation_alone(weight: Tensor, activation: Tensor) -> Tensor:
    """FPS without the weight (eqs. 5 and 6): every neuron of a layer ranks its inputs alike. Arguments as above."""
    return activation.float().expand(weight.shape)


def magnitude(weight: Tensor) -> Tensor:
    """Weight magnitude: the FPS score with all activations equal, and NeuroAda's (arXiv 2510.18940) score."""
    return weight.float().abs()


def random(weight: Tensor, generator: torch.Generator) -> Tensor:
    """A seeded uniform score, the control of every comparison; drawn on the CPU so that all devices agree."""
    return torch.rand(weight.shape, generator=generator, dtype=torch.float32).to(weight.device)
