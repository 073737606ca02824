"""The FPS layer that takes a module's place in a model."""

from typing import Any

from torch import nn

from peft_fps.layers.fps_layer import FPSLayer
from peft_fps.layers.layer_types import layer_class


def adapted(parent: nn.Module, name: str, target: nn.Module, path: str, active: list[str]) -> FPSLayer:
    """Return the FPS layer of a module. A module without one is replaced by a new layer around it.

    Args:
        parent: holds the module.
        name: of the module in its parent.
        target: the module.
        path: of the module in the base model.
        active: names of the active adapters.
    """
    if isinstance(target, FPSLayer):
        return target
    kind = layer_class(target)
    assert kind is not None, path
    layer = kind(target, path)
    layer.set_adapter(active, inference_mode=True)
    setattr(parent, name, layer)
    if isinstance(parent, nn.TransformerEncoderLayer):
        # its fused path reads the weight without calling the layer; any hook makes it step aside
        layer.register_forward_pre_hook(_no_op)
    return layer


def _no_op(module: nn.Module, args: tuple[Any, ...]) -> None:
    return None
