"""Scores of a weight matrix that are tried in FPS's place: pure functions, tensors in, tensors out."""

import math

import torch
from torch import Tensor


RANK_SHARE = 0.02
"""Rank that LIFT keeps, as a share of the smaller side of a matrix (arXiv 2506.00772 finds 1.6 % to 3 % best)."""


def low_rank_magnitude(weight: Tensor) -> Tensor:
    """Return |W_r|, with W_r the best approximation of W by a matrix of low rank (LIFT, arXiv 2506.00772).

    Args:
        weight: `(neurons, inputs)`. The rank is 2 % of its smaller side, rounded up.

    Returns:
        `(neurons, inputs)` float64.
    """
    rank = math.ceil(RANK_SHARE * min(weight.shape))
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    return ((left[:, :rank] * values[:rank]) @ right[:rank]).abs()


def relative_importance(weight: Tensor, activation: Tensor) -> Tensor:
    """Return (|w| / Σ of its column + |w| / Σ of its row) · √activation (RIA, ICLR 2024, with the exponent 0.5).

    The sum of a column divides away what all neurons read strongly. A row or column of zeros scores 0.

    Args:
        weight: `(neurons, inputs)`.
        activation: typical magnitude of each input, `(inputs,)`. RIA takes the l2 norm.

    Returns:
        `(neurons, inputs)` float64.
    """
    size = weight.double().abs()
    tiny = torch.finfo(torch.float64).tiny
    by_column = size / size.sum(0, keepdim=True).clamp_min(tiny)
    by_row = size / size.sum(1, keepdim=True).clamp_min(tiny)
    return (by_column + by_row) * activation.double().sqrt()


def expected_gradient(weight: Tensor, activation: Tensor, gradient: Tensor) -> Tensor:
    """Return |w| · E|a| · E|δ|, with the mean sizes of a weight's two factors in place of their mean product.

    The gradient of the loss for a weight is the sum of a · δ over tokens, with a its input and δ the gradient at its
    neuron's output. Within a neuron this score ranks as FPS does (arXiv 2510.27359, eq. 2). It ranks neurons as well.

    Args:
        weight: `(neurons, inputs)`.
        activation: mean |a| of each input, `(inputs,)`.
        gradient: mean |δ| at each neuron's output, `(neurons,)`.

    Returns:
        `(neurons, inputs)` float64.
    """
    return weight.double().abs() * activation.double() * gradient.double()[:, None]
