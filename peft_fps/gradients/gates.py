"""Hard-concrete gates (Louizos et al. 2018, arXiv 1712.01312; as in DiffPruning, arXiv 2012.07463, eqs. 5-8).

A gate is a number from 0 to 1 that is exactly 0 or exactly 1 with positive probability, and whose logit α is learned.
"""

import math

import torch
from torch import Tensor


LEFT, RIGHT = -1.5, 1.5
"""Ends of the stretched interval, as DiffPruning's code has them."""
FIRST_LOGIT = 5.0
"""Where α starts: the gate is open with probability 0.993."""
MARGIN = 1e-4
"""Uniform noise keeps away from 0 and 1 by this much."""


def sample_gate(logit: Tensor, noise: Tensor) -> Tensor:
    """Return sampled gates, differentiable with respect to `logit`.

    Args:
        logit: α, any shape.
        noise: of that shape, uniform in (0, 1).
    """
    return _stretch(torch.sigmoid(torch.logit(noise, eps=MARGIN) + logit))


def typical_gate(logit: Tensor) -> Tensor:
    """Return the gates without noise: what is used once they are learned."""
    return _stretch(torch.sigmoid(logit))


def open_probability(logit: Tensor) -> Tensor:
    """Return the probability that a gate is not 0; their sum is the expected L0 norm."""
    return torch.sigmoid(logit - math.log(-LEFT / RIGHT))


def _stretch(share: Tensor) -> Tensor:
    return (share * (RIGHT - LEFT) + LEFT).clamp(0, 1)
