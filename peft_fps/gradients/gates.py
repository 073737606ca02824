"""Hard-concrete gates (Louizos et al. 2018, arXiv 1712.01312; as in DiffPruning, arXiv 2012.07463, eqs. 5-8).

A gate is a random number from 0 to 1 that is exactly 0 or exactly 1 with positive probability. Training learns its
logit α.
"""

import math

import torch
from torch import Tensor


LEFT, RIGHT = -1.5, 1.5
"""Ends of the stretched interval, as in DiffPruning's code."""
FIRST_LOGIT = 5.0
"""Initial α. The gate is open with probability 0.993."""
MARGIN = 1e-4
"""Smallest distance of uniform noise from 0 and from 1."""


def sample_gate(logit: Tensor, noise: Tensor) -> Tensor:
    """Return gates for given noise, with a gradient for `logit`.

    Args:
        logit: α, of any shape.
        noise: uniform in (0, 1), of the same shape.
    """
    return _stretch(torch.sigmoid(torch.logit(noise, eps=MARGIN) + logit))


def typical_gate(logit: Tensor) -> Tensor:
    """Return gates without noise, which replace sampled ones after training. `logit` is α, of any shape."""
    return _stretch(torch.sigmoid(logit))


def open_probability(logit: Tensor) -> Tensor:
    """Return the probability that each gate is not 0. The sum of the probabilities is the expected L0 norm.

    Args:
        logit: α, of any shape.
    """
    return torch.sigmoid(logit - math.log(-LEFT / RIGHT))


def _stretch(share: Tensor) -> Tensor:
    """Stretch numbers in (0, 1) to (`LEFT`, `RIGHT`), and clamp them to [0, 1]."""
    return (share * (RIGHT - LEFT) + LEFT).clamp(0, 1)
