"""FPS layers over normalisations, of which an adapter trains the bias alone."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_fps.base.substitution import call_with, twin_with
from peft_fps.layers.fps_layer import FPSLayer
from peft_fps.layers.merge_record import MergeRecord, add_to_bias
from peft_fps.layers.rebuilt_inputs import note_producer
from peft_fps.selection.module_sizes import ModuleSizes


FORMER_TENSORS = ("fps_values", "fps_columns", "fps_row_counts")
"""Tensors without entries that state dicts of earlier versions hold for a norm, besides its bias delta."""


class Norm(FPSLayer):
    """`torch.nn.LayerNorm` with a trained bias; neurons are the elements of the normalised shape.

    Maps `(..., *normalized_shape)` to the same shape; subclasses of the norm may have another layout.
    """

    base_class = nn.LayerNorm

    def __init__(self, base_layer: Any, module_path: str) -> None:
        super().__init__(base_layer, module_path)
        self._checked: set[str] = set()

    @classmethod
    def neurons_of(cls, base_layer: Any) -> int:
        """Return the number of elements of the norm's bias."""
        neurons: int = base_layer.bias.numel()
        return neurons

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_checked": set()}

    # --- forward ----------------------------------------------------------------------------------------------------

    def _forward_with(self, names: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = self.base_layer
        for name in names:
            self.prepare(name)
        deltas = [delta.view(base.bias.shape) for delta in self._bias_deltas(names)]
        if not self._is_bare(base):
            result: Tensor = base(x, *args, **kwargs)
            return result + self._placed(sum(deltas), x, *args, **kwargs).to(result.dtype) if deltas else result
        bias = base.bias
        for delta in deltas:
            bias = bias + delta
        bias = bias.to(base.bias.dtype)
        if type(base).forward is not self.base_class.forward:
            return call_with(base, {"bias": bias}, x, *args, **kwargs) if deltas else base(x, *args, **kwargs)
        form = partial(_layer_norm, tuple(base.normalized_shape), base.eps)
        result = form(x, base.weight, bias)
        note_producer(result, form, [x, base.weight, bias])
        return result

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

    # --- the bias delta ---------------------------------------------------------------------------------------------

    def sizes(self, adapter_name: str) -> ModuleSizes:
        """Return the sizes as a saved config records them of a norm: it has no inputs and no entries."""
        return ModuleSizes(self.neurons, inputs=0, entries=0)

    def _prepare(self, adapter_name: str) -> None:
        if adapter_name not in self._checked or self.is_away(adapter_name):
            self._refuse_tracing(adapter_name, self.fps_bias[adapter_name])
            self.check_tensors(adapter_name)
            self._checked.add(adapter_name)

    def is_prepared(self, adapter_name: str) -> bool:
        """Whether the adapter's bias delta was checked since it was last loaded."""
        return adapter_name in self._checked

    def forget(self, adapter_name: str) -> None:
        """Let the next use check the adapter's bias delta."""
        self._checked.discard(adapter_name)

    def resize_bias(self, adapter_name: str, neurons: int) -> None:
        """Make room for a bias delta of another size, to be set next."""
        self.forget(adapter_name)
        super().resize_bias(adapter_name, neurons)

    def _resized(self, adapter_name: str, tensors: Mapping[str, Tensor | None]) -> bool | None:
        bias = tensors["fps_bias"]
        return None if bias is None else bias.numel() > 0

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for key in [f"{prefix}{held}.{name}" for held in FORMER_TENSORS for name in self.fps_state]:
            state_dict.pop(key, None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """Return zeros in the shape and dtype of the base weight, which no adapter changes."""
        return torch.zeros_like(self.base_layer.weight)

    def _merge_into(self, base: Any, name: str) -> MergeRecord:
        bias = self.bias_delta(name)
        before, written, changes, lost = add_to_bias(base, None if bias is None else self.scaled(bias.data, name))
        nowhere = torch.zeros(0, dtype=torch.int64, device=base.weight.device)
        nothing = base.weight.detach().new_zeros(0)
        return MergeRecord(nowhere, nothing, nothing, before, written, changes, lost)


def is_biased_norm(module: nn.Module) -> bool:
    """Whether a base layer is a LayerNorm with a bias, which `bias="with_norms"` trains."""
    return isinstance(module, nn.LayerNorm) and module.weight is not None and module.bias is not None


def _layer_norm(shape: tuple[int, ...], eps: float, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`F.layer_norm` with the constants first, so that `partial` binds them and the tensors stay open."""
    return F.layer_norm(x, shape, weight, bias, eps)
