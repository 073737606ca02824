"""FPS layers over 2-D convolutions."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_fps.layers.sparse_product import ProductLayer
from peft_fps.sparse import Kept, Structure, dense_delta, sparse_conv2d


class Conv2d(ProductLayer):
    """`torch.nn.Conv2d` with sparse changes; a neuron is an output channel, its inputs a flattened patch.

    Maps `(batch, in_channels, height, width)` to `(batch, out_channels, height', width')`.
    """

    base_class = nn.Conv2d
    neuron_axis = -3

    def _along_neurons(self, bias: Tensor) -> Tensor:
        return bias[:, None, None]

    def _features(self) -> tuple[int, int]:
        return self.base_layer.in_channels, self.base_layer.out_channels

    def _kept(
        self, x: Tensor, dtype: torch.dtype, values: Tensor, structure: Structure, names: list[str]
    ) -> Kept | None:
        return None

    def _product(
        self, x: Tensor, values: Tensor, bias: Tensor | None, structure: Structure, kept: Kept | None
    ) -> Tensor:
        x, padding = padded_input(self.base_layer, x)
        base = self.base_layer
        geometry = (base.stride, padding, base.dilation, base.groups)
        return sparse_conv2d(x, base.weight, values, bias, structure, geometry)

    def _delta_product(self, x: Tensor, values: Tensor, structure: Structure, kept: Kept | None) -> Tensor:
        x, padding = padded_input(self.base_layer, x)
        base = self.base_layer
        delta = dense_delta(values, structure, base.weight.shape).to(x.dtype)
        return F.conv2d(x, delta, None, base.stride, padding, base.dilation, base.groups)


def padded_input(base: Any, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Return the input of a zero-padded convolution that equals `base` on `x`, and its padding.

    Padding modes other than zeros, and uneven `"same"` padding, are applied to the input, as `nn.Conv2d` itself does.
    """
    sides = base._reversed_padding_repeated_twice
    if base.padding_mode != "zeros":
        return F.pad(x, sides, mode=base.padding_mode), (0, 0)
    if isinstance(base.padding, str):
        return F.pad(x, sides), (0, 0)
    return x, base.padding
