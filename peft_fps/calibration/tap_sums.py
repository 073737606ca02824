"""Sums over the input of a convolution, by input channel and position in the kernel (a tap)."""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_fps.base.substitution import TRANSPOSED
from peft_fps.calibration.statistics import summand, wide_dtype


def convolution_sums(x: Tensor, convolution: Any, norm: str, mask: Tensor | None = None) -> tuple[Tensor, int]:
    """Sum |a|, a² or a of every input of a convolution or transposed convolution over the positions where it counts.

    Args:
        x: what the convolution gets, `(batch, channels, *size)`, or one example `(channels, *size)`.
        convolution: gives the geometry.
        norm: `"l1"` for |a|, `"l2"` for a², `"signed"` for a.
        mask: `(batch, positions)` of a batch of sequences, zero at padding, which does not count. A convolution that
            gives another number of positions than it gets has no padding that is known. Default: all positions count.

    Returns:
        As `patch_sums`, or as `spread_sums` if the convolution is transposed.
    """
    batched = x if x.dim() == len(convolution.kernel_size) + 2 else x[None]
    if isinstance(convolution, TRANSPOSED):
        return spread_sums(batched, convolution, norm, mask)
    return patch_sums(pad_like(batched, convolution), convolution, norm, mask)


def patch_sums(x: Tensor, convolution: Any, norm: str, mask: Tensor | None = None) -> tuple[Tensor, int]:
    """Sum |a|, a² or a of every input of a convolution over all output positions.

    An input is a channel within a group together with a position in the kernel. Its sum is that of a strided view, so
    that no patch is copied.

    Args:
        x: padded activations, `(batch, channels, *size)`.
        convolution: gives kernel size, stride, dilation and groups.
        norm: `"l1"` for |a|, `"l2"` for a², `"signed"` for a.
        mask: `(batch, positions)`, which counts if it has as many positions as the output. Default: all count.

    Returns:
        Sums `(groups, inputs)` in the dtype of `wide_dtype`, with inputs = channels / groups · taps, and the number of
        output positions that count.
    """
    kernel, stride, dilation = convolution.kernel_size, convolution.stride, convolution.dilation
    sizes = [
        (size - step * (taps - 1) - 1) // jump + 1
        for size, taps, jump, step in zip(x.shape[2:], kernel, stride, dilation, strict=True)
    ]
    kept = mask if mask is not None and [*mask.shape[1:]] == sizes else None
    sums = []
    for tap in _taps(kernel):
        view = x
        for axis, (place, size) in enumerate(zip(tap, sizes, strict=True)):
            first = place * dilation[axis]
            view = _part(view, axis + 2, slice(first, first + stride[axis] * (size - 1) + 1, stride[axis]))
        sums.append(_power_sum(_masked(view, kept), norm))
    positions = x.shape[0] * torch.Size(sizes).numel() if kept is None else int(kept.bool().sum())
    return torch.stack(sums, dim=1).reshape(convolution.groups, -1), positions


def spread_sums(x: Tensor, convolution: Any, norm: str, mask: Tensor | None = None) -> tuple[Tensor, int]:
    """Sum |a|, a² or a of every input of a transposed convolution over all input positions.

    An input is a channel within a group together with a tap. Its weight multiplies every position of the channel, and
    the tap says where in the output the product is added. Products that fall outside of the output, where the padding
    cuts it, count as zero, as what a convolution reads in its padding does. So without padding all taps of a channel
    have the same sum.

    Args:
        x: activations, `(batch, channels, *size)`.
        convolution: gives kernel size, stride, padding, output padding, dilation and groups.
        norm: `"l1"` for |a|, `"l2"` for a², `"signed"` for a.
        mask: `(batch, positions)`, zero at padding. Default: all count.

    Returns:
        Sums `(groups, inputs)` in the dtype of `wide_dtype`, with inputs = channels / groups · taps, and the number of
        input positions that count.
    """
    x, sums = _masked(x, mask), []
    for tap in _taps(convolution.kernel_size):
        view = x
        for axis, place in enumerate(tap):
            view = _part(view, axis + 2, _reaching(convolution, axis, place, x.shape[axis + 2]))
        sums.append(_power_sum(view, norm))
    positions = x.shape[0] * x.shape[2:].numel() if mask is None else int(mask.bool().sum())
    return torch.stack(sums, dim=1).reshape(convolution.groups, -1), positions


def pad_like(x: Tensor, convolution: Any) -> Tensor:
    """Return `x` `(batch, channels, *size)` with the padding of a convolution, in its padding mode."""
    mode = "constant" if convolution.padding_mode == "zeros" else convolution.padding_mode
    return F.pad(x, convolution._reversed_padding_repeated_twice, mode=mode)


def _taps(kernel: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Yield the positions of a kernel in the order in which its weight is stored."""
    return product(*(range(size) for size in kernel))


def _reaching(convolution: Any, axis: int, tap: int, size: int) -> slice:
    """Return the input positions of which a tap reaches the output of a transposed convolution, along one axis."""
    stride, padding = convolution.stride[axis], convolution.padding[axis]
    dilation, more = convolution.dilation[axis], convolution.output_padding[axis]
    reach = dilation * (convolution.kernel_size[axis] - 1)
    last = (size - 1) * stride - 2 * padding + reach + more  # of the output's positions
    shift = padding - tap * dilation  # position p of the input is added at p · stride - shift
    return slice(max(-(-shift // stride), 0), max((last + shift) // stride + 1, 0))


def _part(x: Tensor, axis: int, places: slice) -> Tensor:
    """Return a view of a slice along one axis."""
    return x[(slice(None),) * axis + (places,)]


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return `x` `(batch, channels, positions)` with zeros where the mask is zero, whatever stood there."""
    return x if mask is None else torch.where(mask[:, None].bool(), x, 0)


def _power_sum(x: Tensor, norm: str) -> Tensor:
    """Sum |x|, x² or x of `(batch, channels, *size)` per channel, `(channels,)` in the dtype of `wide_dtype`."""
    power = summand(x.to(torch.promote_types(x.dtype, torch.float32)) if norm == "l2" else x, norm)
    return power.sum((0, *range(2, x.dim())), dtype=wide_dtype(x.device))
