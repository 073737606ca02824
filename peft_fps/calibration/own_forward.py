"""The tensor that a layer with an overridden forward multiplies with its weight, or looks up in it.

Such a layer may pad or normalise its input first, or derive positions from it. So the call of PyTorch's product shows
the tensor, not the call of the layer.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


ARGUMENTS: dict[Any, tuple[str, ...]] = {
    F.linear: ("input", "weight", "bias"),
    F.embedding: ("input", "weight"),
    torch.conv2d: ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
}


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
        names = ARGUMENTS.get(func)
        if names is not None and self.first is None:
            given = dict(zip(names, args, strict=False)) | (kwargs or {})
            if given["weight"].shape == self._base.weight.shape:
                self.first = given["input"], self._equivalent(given)
        return func(*args, **(kwargs or {}))

    def _equivalent(self, given: dict[str, Any]) -> nn.Module:
        """Return a layer without memory that has the geometry of a product, from the arguments of the product."""
        base = self._base
        if isinstance(base, nn.Embedding):
            return nn.Embedding(base.num_embeddings, base.embedding_dim, device="meta")
        if not isinstance(base, nn.Conv2d):
            return nn.Linear(base.in_features, base.out_features, device="meta")
        geometry: Any = {name: given[name] for name in ("stride", "padding", "dilation", "groups") if name in given}
        return nn.Conv2d(base.in_channels, base.out_channels, given["weight"].shape[2:], device="meta", **geometry)
