"""Paths of the base model at which a layer may be put although there is none: opening and finding them."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from peft_fps.base.attention import PROJECTIONS, Projection, has_projections
from peft_fps.base.packed_weight import OpenedModule, PackedWeight, put_module


def weight_at(model: nn.Module, path: str) -> PackedWeight | None:
    """Return the parameter or projection at a path, seen as a layer; None if there is none.

    Args:
        model: with or without adapters.
        path: as in the base model. One that has a layer already counts too.
    """
    owner, _, name = path.rpartition(".")
    module = _base_at(model, owner)
    if module is None:
        return None
    if has_projections(module) and name in PROJECTIONS:
        return Projection(module, name)
    return PackedWeight(module, name) if module._parameters.get(name) is not None else None


def module_at(model: nn.Module, path: str) -> Any:
    """Return the module at a path, or the parameter or projection there, seen as a layer.

    Args:
        model: with or without adapters.
        path: as in the base model. That of a parameter which has a layer already means the layer.
    """
    found = weight_at(model, path)
    if found is None:
        return model.get_submodule(path)
    owner, _, name = path.rpartition(".")
    module = model.get_submodule(owner)
    return module._modules[name] if isinstance(module, OpenedModule) and name in module._modules else found


def open_modules(model: nn.Module, paths: Iterable[str]) -> None:
    """Put a `PackedWeight` at paths, unless there is a layer already."""
    for path in paths:
        found = weight_at(model, path)
        assert found is not None, path
        owner, _, name = path.rpartition(".")
        module = model.get_submodule(owner)
        if not isinstance(module, OpenedModule):
            module = OpenedModule(module)
            put_module(model, owner, module)
            if isinstance(model.get_submodule(owner.rpartition(".")[0]), nn.TransformerEncoderLayer):
                keep_off_fused_path(module)
        if name not in module._modules:
            module._modules[name] = found


def keep_off_fused_path(module: nn.Module) -> None:
    """Keep the fused path of PyTorch's `TransformerEncoderLayer` from reading a module's weight without calling it.

    Any hook on a module inside the layer makes that path step aside.
    """
    module.register_forward_pre_hook(_no_op)


def _base_at(model: nn.Module, path: str) -> nn.Module | None:
    """Return the module of the base model at a path, None if there is no module."""
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    return module.base_layer if isinstance(module, OpenedModule) else module


def _no_op(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Forward pre-hook that does nothing."""
    return None
