"""Lookup of an adapter's layers in a model, which PEFT, `torch.compile` or a trainer may have wrapped."""

from collections.abc import Mapping

from peft import PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from peft_fps.base.compiled import unwrapped
from peft_fps.layers.adapter_state import AdapterState
from peft_fps.layers.entry_layer import EntryLayer
from peft_fps.layers.fps_layer import FPSLayer


def fps_layers(model: nn.Module) -> dict[str, FPSLayer]:
    """Return all FPS layers of a model, by their full name in it."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FPSLayer)}


def base_model(model: nn.Module) -> nn.Module:
    """Return the model inside a `PeftModel` and wrappers of `torch.compile`, or the model itself."""
    model = unwrapped(model)
    if isinstance(model, PeftMixedModel):
        return unwrapped(model.base_model.model)
    return unwrapped(model.get_base_model()) if isinstance(model, PeftModel) else model


def place_of(model: nn.Module, name: str) -> str:
    """Return the name of the place that an FPS layer has in a model, which a LoRA layer around it may stand in.

    Args:
        model: has the layer.
        name: of the layer.
    """
    outer = name.removesuffix(".base_layer")
    return outer if outer != name and isinstance(model.get_submodule(outer), BaseTunerLayer) else name


def adapter_layers(model: nn.Module, adapter_name: str) -> dict[str, FPSLayer]:
    """Return the layers in which the adapter holds entries or a bias delta, by their path in the base model."""
    return {path: layer for path, layer in target_layers(model, adapter_name).items() if layer.carries(adapter_name)}


def places_of(model: nn.Module, adapter_name: str) -> list[str]:
    """Return the full names of an adapter's layers in a model, which may hold the base model in a part of it."""
    return [place_of(model, name) for name, layer in fps_layers(model).items() if layer.carries(adapter_name)]


def target_layers(model: nn.Module, adapter_name: str) -> dict[str, FPSLayer]:
    """Return all layers that the adapter targets, by path in the base model, those that no data reached included.

    Raises:
        ValueError: parts of the model have adapters of this name each.
    """
    layers = {name: layer for name, layer in fps_layers(model).items() if adapter_name in layer.fps_state}
    first = {id(layer.fps_state[adapter_name]): name for name, layer in reversed(layers.items())}
    if len(first) > 1:
        places = ", ".join(reversed(first.values()))
        raise ValueError(
            f"Several parts of this model have an adapter {adapter_name!r} each, of which {places} are layers, "
            "expected one adapter of a name. Pass the part, or give the adapters different names and "
            "choose one with adapter_name=..."
        )
    return {layer.module_path: layer for layer in layers.values()}


def adapter_state(layers: Mapping[str, FPSLayer], adapter_name: str) -> AdapterState:
    """Return the state of an adapter, which is one object that all of its layers hold.

    Args:
        layers: of the adapter, at least one.
        adapter_name: name of the adapter.
    """
    return next(iter(layers.values())).fps_state[adapter_name]


def entry_layers(layers: Mapping[str, FPSLayer]) -> dict[str, EntryLayer]:
    """Return the layers with sparse entries by the same names. Norms are left out."""
    return {name: layer for name, layer in layers.items() if isinstance(layer, EntryLayer)}


def whole_parameters(model: nn.Module, adapter_name: str) -> dict[str, nn.Parameter]:
    """Return the parameters of the modules that the adapter trains whole (`modules_to_save`), by name."""
    wrappers = (
        (name, module) for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)
    )
    found = {
        id(parameter): (f"{name}.{own}", parameter)
        for name, wrapper in wrappers
        for own, parameter in wrapper.named_parameters()
        if f".{adapter_name}." in f".{own}"
    }
    return dict(found.values())  # a shared module's once


def active_adapter(model: nn.Module) -> str:
    """Return the name of the one active FPS adapter. Adapters of other methods do not count.

    Raises:
        ValueError: none is active, or several are.
    """
    layers = fps_layers(model).values()
    known = {name for layer in layers for name in layer.fps_state}
    active = {name: None for layer in layers for name in layer.active_adapters if name in known}
    if len(active) != 1:
        found = f"the active adapters {sorted(active)}" if active else "no active FPS adapter"
        raise ValueError(f"Found {found}, expected one. Say which one with adapter_name=...")
    return next(iter(active))
