"""FPS layers over the two kinds of linear layers."""

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D as TransformersConv1D

from peft_fps.layers.sparse_product import ProductLayer
from peft_fps.sparse import Layout


class Linear(ProductLayer):
    """`torch.nn.Linear` with sparse changes: `y = x (W + ΔW)ᵀ + b + Δb`, weight `(out_features, in_features)`.

    Maps `(..., in_features)` to `(..., out_features)`.
    """

    base_class = nn.Linear


class Conv1DLinear(ProductLayer):
    """transformers' `Conv1D` with sparse changes: linear, with the weight stored as `(in_features, out_features)`.

    "Linear" is in the name because PEFT finds wrapped linear layers by it (`target_modules="all-linear"`). Maps
    `(..., in_features)` to `(..., out_features)`.
    """

    base_class = TransformersConv1D

    @classmethod
    def layout_of(cls, base_layer: Any) -> Layout:
        """Return that the weight is stored as `(inputs, neurons)`."""
        return Layout(transposed=True)
