"""Where an adapter's tensors lie: with the weight, or where accelerate brings a weight that it offloads."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from peft_fps.layers.adapter_state import AdapterState


class PlacedLayer(BaseTunerLayer):
    """The part of an FPS layer that keeps adapters' tensors where the weight is.

    Attributes:
        base_layer: has the weight.
        module_path: path of the layer in the base model, for messages.
        adapter_layer_names: names of the attributes that hold trained tensors by adapter.
        index_names: names of the attributes that hold integer tensors by adapter.
        fps_state: what the layers of each adapter share, by the names of the adapters that this layer has.
        fps_threshold: per adapter with gates `(1,)`, the threshold; None until there is such an adapter.
    """

    base_layer: Any
    module_path: str
    index_names: tuple[str, ...] = ()
    fps_state: dict[str, AdapterState]
    fps_threshold: nn.ParameterDict | None

    def threshold(self, adapter_name: str) -> nn.Parameter | None:
        """Return the threshold `(1,)` of the adapter's gate; None if it has no gate here."""
        held = self.fps_threshold
        return None if held is None or adapter_name not in held else held[adapter_name]

    @property
    def weight_tensor(self) -> Tensor:
        """The tensor that stores the base weight."""
        tensor: Tensor = self.base_layer.weight
        return tensor

    def adapter_parameters(self, adapter_name: str) -> list[nn.Parameter]:
        """Return what the adapter trains here: values, bias delta and threshold, as far as it has them."""
        trained = (getattr(self, name) for name in self.adapter_layer_names)
        return [held[adapter_name] for held in trained if adapter_name in held]

    def is_finite(self, adapter_name: str) -> bool:
        """Return whether all numbers that the adapter trains here are finite."""
        return all(bool(torch.isfinite(each.detach()).all()) for each in self.adapter_parameters(adapter_name))

    def index_tensors(self, adapter_name: str) -> list[Tensor]:
        """Return the integer tensors that say where the adapter's entries lie."""
        return [getattr(self, name)[adapter_name] for name in self.index_names]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's version also casts values to the base layer's dtype, which would lose digits that were just loaded
        if adapter_name not in self.fps_state:
            return
        device = device or self._adapter_device()
        for parameter in self.adapter_parameters(adapter_name):
            if parameter.device.type != "meta":
                parameter.data = parameter.data.to(device)
        for name in self.index_names:
            buffers: BufferDict = getattr(self, name)
            if buffers[adapter_name].device.type != "meta":
                buffers[adapter_name] = buffers[adapter_name].to(device)

    @contextmanager
    def weight_at_hand(self) -> Iterator[None]:
        """Have a weight that accelerate offloads at hand within the context, as a call of the layer would."""
        base = self.base_layer
        hook = getattr(base, "_hf_hook", None)
        if hook is None or self.weight_tensor.device.type != "meta":
            yield
            return
        try:
            hook.pre_forward(base)
            yield
        finally:
            hook.post_forward(base, None)

    def _adapter_device(self) -> torch.device:
        """The weight's device, or where accelerate will bring a weight that it offloads."""
        device = self.weight_tensor.device
        if device.type != "meta":
            return device
        for hook in _single_hooks(getattr(self.base_layer, "_hf_hook", None)):
            if getattr(hook, "offload", False):
                return torch.device("cpu" if hook.execution_device is None else hook.execution_device)
        return device


def _single_hooks(hook: Any) -> Iterator[Any]:
    """Yield an accelerate hook, or those that a `SequentialHook` (of others of its kind, perhaps) is made of."""
    for part in getattr(hook, "hooks", ()):
        yield from _single_hooks(part)
    if not hasattr(hook, "hooks"):
        yield hook
