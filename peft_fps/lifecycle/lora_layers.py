"""LoRA layers around FPS layers, and models in which one of the two is out of sight.

A LoRA layer stands in the place of the base layer. An FPS layer of the same place lies within it:

    attention.q_proj                          LoRA, adds B A x to what lies within it
    attention.q_proj.base_layer               FPS, computes with W + ΔW
    attention.q_proj.base_layer.base_layer    the base layer

Each method is added to a model that looks as if it were the only one. So both find their targets by the names of the
base model, in either order, and both save under these names.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn

from peft_fps.layers.lookup import fps_layers


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Return the LoRA layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def take_lora_layers_out(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """Put what lies within LoRA layers in their places.

    Args:
        model: a base model with adapters.

    Returns:
        Of each LoRA layer the module that held it, its name there, and itself.
    """
    taken: list[Any] = [(*_holder(model, path), layer) for path, layer in lora_layers(model).items()]
    for holder, name, layer in taken:
        holder._modules[name] = layer.base_layer
    return taken


@contextmanager
def lora_layers_out(model: nn.Module) -> Iterator[None]:
    """Let a base model look within the block as if it had no LoRA layers. They are put around what is there then."""
    taken = take_lora_layers_out(model)
    try:
        yield
    finally:
        for holder, name, layer in taken:
            layer.base_layer = holder._modules[name]
            holder._modules[name] = layer


@contextmanager
def fps_layers_out(model: nn.Module) -> Iterator[None]:
    """Let a base model look within the block as if it had no FPS layers. They are put within what is there then."""
    taken: list[Any] = [(*_holder(model, path), layer) for path, layer in fps_layers(model).items()]
    for holder, name, layer in taken:
        holder._modules[name] = layer.base_layer
    try:
        yield
    finally:
        for holder, name, layer in taken:
            while isinstance(outer := holder._modules[name], LoraLayer):
                holder, name = outer, "base_layer"
            holder._modules[name] = layer


def _holder(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """Return the module that holds the one at a path, and the name there."""
    parent, _, name = path.rpartition(".")
    return model.get_submodule(parent), name
