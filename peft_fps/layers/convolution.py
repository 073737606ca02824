"""FPS layers over convolutions and transposed convolutions of one, two and three spatial dimensions."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_fps.layers.changed_layer import Change
from peft_fps.layers.sparse_product import ProductLayer
from peft_fps.sparse import Geometry, Kept, Layout, convolve, dense_delta, sparse_convolution


class Convolution(ProductLayer):
    """A convolution with sparse changes; a neuron is an output channel, its inputs a flattened patch.

    Maps `(batch, in_channels, *size)` to `(batch, out_channels, *size')`, or one example without the batch.
    """

    @property
    def neuron_axis(self) -> int:  # type: ignore[override]
        """Axis of the output that runs over neurons."""
        return -1 - len(self.base_layer.kernel_size)

    def _along_neurons(self, bias: Tensor) -> Tensor:
        return bias.view(-1, *[1] * len(self.base_layer.kernel_size))

    def _features(self) -> tuple[int, int]:
        return self.base_layer.in_channels, self.base_layer.out_channels

    def _kept(self, change: Change, x: Tensor, dtype: torch.dtype) -> Kept | None:
        return None

    def _product(
        self, change: Change, x: Tensor, bias: Tensor | None, kept: Kept | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        x, geometry = self._zero_padded(x, *args, **kwargs)
        return sparse_convolution(x, self.base_layer.weight, change.values, bias, change.structure, geometry)

    def _delta_product(self, change: Change, x: Tensor, kept: Kept | None, *args: Any, **kwargs: Any) -> Tensor:
        x, geometry = self._zero_padded(x, *args, **kwargs)
        delta = dense_delta(change.values, change.structure, self.base_layer.weight.shape).to(x.dtype)
        return convolve(x, delta, None, geometry)

    def _zero_padded(self, x: Tensor) -> tuple[Tensor, Geometry]:
        """Return the input of a zero-padded convolution that equals the base layer on `x`, and its geometry."""
        base = self.base_layer
        x, padding = padded_input(base, x)
        return x, Geometry(base.stride, padding, base.dilation, base.groups, output_padding=(0,) * len(padding))


class TransposedConvolution(Convolution):
    """A transposed convolution with sparse changes; a neuron is an output channel.

    A neuron's inputs are the pairs of an input channel of its group and a position in the kernel (a tap). The column
    of an input is `channel · taps + tap`, with the channel counted within the group; see `Layout`.

    Maps `(batch, in_channels, *size)` to `(batch, out_channels, *size')`, or one example without the batch. A call may
    name the `output_size`.
    """

    @classmethod
    def layout_of(cls, base_layer: Any) -> Layout:
        """Return that the weight is stored as `(input channels, neurons / groups, *kernel)`."""
        return Layout(True, base_layer.groups, base_layer.weight.shape[2:].numel())

    def _zero_padded(self, x: Tensor, output_size: list[int] | None = None) -> tuple[Tensor, Geometry]:
        base = self.base_layer
        more = base._output_padding(
            x, output_size, base.stride, base.padding, base.kernel_size, len(base.kernel_size), base.dilation
        )
        return x, Geometry(base.stride, base.padding, base.dilation, base.groups, True, tuple(more))


class Conv1d(Convolution):
    """`torch.nn.Conv1d` with sparse changes."""

    base_class = nn.Conv1d


class Conv2d(Convolution):
    """`torch.nn.Conv2d` with sparse changes."""

    base_class = nn.Conv2d


class Conv3d(Convolution):
    """`torch.nn.Conv3d` with sparse changes."""

    base_class = nn.Conv3d


class ConvTranspose1d(TransposedConvolution):
    """`torch.nn.ConvTranspose1d` with sparse changes."""

    base_class = nn.ConvTranspose1d


class ConvTranspose2d(TransposedConvolution):
    """`torch.nn.ConvTranspose2d` with sparse changes."""

    base_class = nn.ConvTranspose2d


class ConvTranspose3d(TransposedConvolution):
    """`torch.nn.ConvTranspose3d` with sparse changes."""

    base_class = nn.ConvTranspose3d


def padded_input(base: Any, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Return the input of a zero-padded convolution that equals `base` on `x`, and its padding.

    Padding modes other than zeros, and uneven `"same"` padding, are applied to the input, as `nn.Conv2d` itself does.
    """
    sides = base._reversed_padding_repeated_twice
    none = (0,) * len(base.kernel_size)
    if base.padding_mode != "zeros":
        return F.pad(x, sides, mode=base.padding_mode), none
    if isinstance(base.padding, str):
        return F.pad(x, sides), none
    return x, base.padding
