"""The types of FPS layers, by kind of base layer. A new type of layer is entered here."""

from torch import nn
from transformers.pytorch_utils import Conv1D as TransformersConv1D

from peft_fps.base.packed_weight import PackedWeight
from peft_fps.base.quantisation import quantisation
from peft_fps.layers.convolution import (
    Conv1d,
    Conv2d,
    Conv3d,
    ConvTranspose1d,
    ConvTranspose2d,
    ConvTranspose3d,
)
from peft_fps.layers.embedding import Embedding
from peft_fps.layers.entry_layer import EntryLayer
from peft_fps.layers.fps_layer import FPSLayer
from peft_fps.layers.linear import Conv1DLinear, Linear
from peft_fps.layers.norm import Norm, is_biased_norm
from peft_fps.layers.packed_layer import PackedLayer
from peft_fps.layers.quantised_linear import QuantisedLinear


LAYERS: dict[type[nn.Module], type[EntryLayer]] = {
    nn.Linear: Linear,
    TransformersConv1D: Conv1DLinear,
    nn.Conv1d: Conv1d,
    nn.Conv2d: Conv2d,
    nn.Conv3d: Conv3d,
    nn.ConvTranspose1d: ConvTranspose1d,
    nn.ConvTranspose2d: ConvTranspose2d,
    nn.ConvTranspose3d: ConvTranspose3d,
    nn.Embedding: Embedding,
}
"""FPS layer for each kind of base layer with a dense weight matrix; subclasses of a kind count as the kind."""


def entry_layer_class(module: nn.Module) -> type[EntryLayer] | None:
    """Return the FPS layer with sparse entries for a base layer, None if its kind is not supported."""
    if quantisation(module) is not None:  # before its base class, which is a linear layer's too
        return QuantisedLinear
    if isinstance(module, PackedWeight):  # no kind of module that a user could name
        return PackedLayer
    return next((ours for base, ours in LAYERS.items() if isinstance(module, base)), None)


def layer_class(module: nn.Module) -> type[FPSLayer] | None:
    """Return the FPS layer for a base layer, norms with a bias included, None if its kind is not supported."""
    return Norm if is_biased_norm(module) else entry_layer_class(module)
