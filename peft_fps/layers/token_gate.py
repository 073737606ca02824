"""The gate of TS-PEFT (arXiv 2511.16147): a change counts at the positions where it is large beside the base output.

The paper gives the gate. How its threshold is learned is not printed anywhere we could read, so the surrogate gradient
and the form of the sparsity term are ours.
"""

from typing import Any

import torch
from torch import Tensor


LARGEST = 1e3
"""The largest relative magnitude, also where the base output is zero."""


def relative_magnitude(change: Tensor, base: Tensor, axis: int) -> Tensor:
    """Return r = ‖M(x)‖ / ‖W₀x‖ of every position, without gradient, in float32.

    Args:
        change: M(x), what the adapter adds.
        base: W₀x in the same shape, without bias.
        axis: of the neurons.

    Returns:
        The shape of `change` with size 1 along `axis`. 0 where the change is 0, at most `LARGEST`.
    """
    above, below = (part.detach().float().norm(dim=axis, keepdim=True) for part in (change, base))
    return (above / below.clamp_min(torch.finfo(torch.float32).tiny)).clamp_max(LARGEST)


class ThresholdGate(torch.autograd.Function):
    """S = 1 where r ≥ τ, else 0, with a surrogate gradient for τ, and the gradient of a sparsity term.

    dS/dτ is taken as -1/2 where |r - τ| < h, else 0, with h the mean of r. That is a boxcar around the threshold, in
    units of h, so that it is as large for small changes as for large ones. No gradient goes to r: the values of an
    adapter get the gradient of the change where it counts.

    The term λ · mean(S) belongs to the loss. Its gradient is added in backward, as if the term had been added to a
    loss that is neither scaled nor divided.
    """

    @staticmethod
    def forward(ctx: Any, magnitude: Tensor, threshold: Tensor, penalty: float) -> Tensor:
        """Return S in the shape of `magnitude`.

        Args:
            ctx: of torch.
            magnitude: r of every position, float32.
            threshold: τ, `(1,)`.
            penalty: λ, 0 for no sparsity term.
        """
        ctx.save_for_backward(magnitude, threshold)
        ctx.penalty = penalty
        return (magnitude >= threshold).to(magnitude.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Return the gradient of τ alone."""
        magnitude, threshold = ctx.saved_tensors
        near = ((magnitude - threshold).abs() < magnitude.mean()).to(magnitude.dtype) / 2
        gradient = -(gradients[0] * near).sum() - ctx.penalty * near.mean()
        return None, gradient.reshape(threshold.shape).to(threshold.dtype), None


def passing(magnitude: Tensor, threshold: Tensor, penalty: float) -> Tensor:
    """Return where a change counts: 1 where r ≥ τ, else 0, with the gradients of `ThresholdGate`.

    Args:
        magnitude: r of every position, float32.
        threshold: τ, `(1,)`.
        penalty: λ, the weight of the share of positions that pass, in the loss. 0 for no such term.
    """
    result: Tensor = ThresholdGate.apply(magnitude, threshold, penalty)
    return result
