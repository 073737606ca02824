"""Which tuner layer goes with which kind of base layer."""

from torch import nn
from transformers.pytorch_utils import Conv1D as TransformersConv1D

from peft_fps.layers import AdaptedLayer, Conv1DLinear, Conv2d, Linear, is_biased_norm
from peft_fps.norms import Norm
from peft_fps.quantised import quantisation
from peft_fps.quantised_layers import QuantisedLinear


LAYERS: dict[type[nn.Module], type[AdaptedLayer]] = {
    nn.Linear: Linear,
    TransformersConv1D: Conv1DLinear,
    nn.Conv2d: Conv2d,
}
"""Tuner layer for each kind of base layer with a dense weight matrix; subclasses of a kind count as the kind."""


def layer_class(module: nn.Module) -> type[AdaptedLayer] | None:
    """Return the tuner layer for a base layer, None if its kind is not supported."""
    if is_biased_norm(module):
        return Norm
    if quantisation(module) is not None:  # before its base class, which is a linear layer's too
        return QuantisedLinear
    return next((ours for base, ours in LAYERS.items() if isinstance(module, base)), None)
