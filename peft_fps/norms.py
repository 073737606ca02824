"""The tuner layer of normalisations, of which an adapter trains the bias alone."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_fps.adapters import AdapterState
from peft_fps.inputs import note_producer
from peft_fps.layers import AdaptedLayer
from peft_fps.substitution import call_with, twin_with


class Norm(AdaptedLayer):
    """`torch.nn.LayerNorm` with a trained bias: no entries, neurons are the elements of the normalised shape."""

    base_class = nn.LayerNorm
    # values are always empty, and stay out of the forward: a trained parameter without a gradient would stop
    # DistributedDataParallel
    adapter_layer_names = ("fps_bias",)
    other_param_names = ("fps_values", "fps_columns", "fps_row_counts", "fps_state", "scaling")

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map `(..., *normalized_shape)` to the same shape; subclasses of the norm may have another layout."""
        return self._apply_adapters(x, *args, **kwargs)

    def update_layer(
        self, adapter_name: str, entries: int, bias: bool, state: AdapterState, inference_mode: bool = False
    ) -> None:
        """Add an adapter; as for other layers, its bias delta is not valid before it is selected or loaded."""
        super().update_layer(adapter_name, entries, bias, state, inference_mode)
        self.fps_values[adapter_name].requires_grad_(False)

    def _forward_with(self, names: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = self.base_layer
        self._check(names)
        deltas = [delta.view(base.bias.shape) for delta in self._bias_deltas(names)]
        if not self._is_bare():
            result = base(x, *args, **kwargs)
            return result + self._placed(sum(deltas), x, *args, **kwargs).to(result.dtype) if deltas else result
        bias = base.bias
        for delta in deltas:
            bias = bias + delta
        bias = bias.to(base.bias.dtype)
        if not self._owns_forward():
            return call_with(base, {"bias": bias}, x, *args, **kwargs) if deltas else base(x, *args, **kwargs)
        form = partial(_layer_norm, tuple(base.normalized_shape), base.eps)
        result = form(x, base.weight, bias)
        note_producer(result, form, [x, base.weight, bias])
        return result

    def _check(self, names: list[str]) -> None:
        for name in names:
            self.structure(name)  # checks the tensors, unless they are the ones last checked

    def _placed(self, delta: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Shape a delta so that it adds to the output of a base layer with hooks or a forward put over its own."""
        if type(self.base_layer).forward is self.base_class.forward:
            return delta
        # where a subclass puts its bias (channels may come first) it alone knows: with no weight, nothing else is left
        delta = delta.to(self.base_layer.bias.dtype)
        alone = {"weight": torch.zeros_like(delta), "bias": delta}
        if torch.compiler.is_compiling():
            return call_with(self.base_layer, alone, x.detach(), *args, **kwargs)
        return type(self.base_layer).forward(twin_with(self.base_layer, alone), x.detach(), *args, **kwargs)


def _layer_norm(shape: tuple[int, ...], eps: float, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, shape, weight, bias, eps)
