"""The tensor that a layer multiplies with its weight, or looks up in it, and the geometry of the product.

A layer with an overridden forward may pad or normalise its input first, or derive positions from it. A transposed
convolution may be called with an `output_size`. So PyTorch's product shows them, not the call of the layer.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")

PRODUCTS: dict[Any, tuple[type[nn.Module], tuple[str, ...]]] = {
    F.linear: (nn.Linear, ("input", "weight", "bias")),
    F.embedding: (nn.Embedding, ("input", "weight")),
    torch.conv1d: (nn.Conv1d, CONVOLUTION),
    torch.conv2d: (nn.Conv2d, CONVOLUTION),
    torch.conv3d: (nn.Conv3d, CONVOLUTION),
    torch.conv_transpose1d: (nn.ConvTranspose1d, TRANSPOSED),
    torch.conv_transpose2d: (nn.ConvTranspose2d, TRANSPOSED),
    torch.conv_transpose3d: (nn.ConvTranspose3d, TRANSPOSED),
}
"""PyTorch's products with a weight: the kind of layer that computes each, and the names of its arguments."""


class WatchedProduct(TorchFunctionMode):
    """Context that records the first product with a weight of a layer's shape.

    Attributes:
        first: input of the first product, and a linear layer or convolution with the geometry of the product. None
            before the first product.

    Args:
        base: layer whose weight has the shape.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.first: tuple[Tensor, nn.Module] | None = None
        self._base: Any = base

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kind, names = PRODUCTS.get(func, (None, ()))
        if self.first is None and kind is not None and isinstance(self._base, kind):
            given = dict(zip(names, args, strict=False)) | (kwargs or {})
            if given["weight"].shape == self._base.weight.shape:
                self.first = given["input"], self._equivalent(kind, given)
        return func(*args, **(kwargs or {}))

    def _equivalent(self, kind: Any, given: dict[str, Any]) -> nn.Module:
        """Return a layer without memory that has the geometry of a product.

        Args:
            kind: of layer that computes the product.
            given: arguments of the product.
        """
        base = self._base
        if kind is nn.Embedding:
            return nn.Embedding(base.num_embeddings, base.embedding_dim, device="meta")
        if kind is nn.Linear:
            layer: nn.Module = kind(base.in_features, base.out_features, device="meta")
            return layer
        names = (*CONVOLUTION[3:], "output_padding")
        geometry = {name: _fixed(given[name]) for name in names if name in given}
        layer = kind(base.in_channels, base.out_channels, given["weight"].shape[2:], device="meta", **geometry)
        return layer


def _fixed(number: Any) -> Any:
    """Return a list of numbers as a tuple, which the constructors of convolutions take, and anything else as it is."""
    return tuple(number) if isinstance(number, list) else number
