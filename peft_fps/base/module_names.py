"""The names that modules of the base model have, adapters left out: all names of one module, members of lists."""

from collections.abc import Iterable, Iterator
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from peft_fps.base.packed_weight import OpenedModule


LISTS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def all_names(model: nn.Module, names: Iterable[str], shared: bool = True) -> list[str]:
    """Return all names of some modules, in the model's order. A module that lies within another one is left out.

    Args:
        model: with or without adapters.
        names: one full name of each module, at least.
        shared: add layers that share a weight with these modules, as detectors' decoders do. Embeddings are left out.
    """
    modules = [bare(model.get_submodule(name)) for name in names]
    inner = [part for module in modules for part in module.modules() if shared and not isinstance(part, nn.Embedding)]
    tensors = {id(parameter) for part in inner for parameter in part.parameters(recurse=False)}
    wanted = {id(module) for module in modules}
    kept: list[str] = []
    for name, module in named_outside(model):
        own = [] if isinstance(bare(module), nn.Embedding) else bare(module).parameters(recurse=False)
        within = name.startswith(tuple(f"{outer}." for outer in kept))
        if not within and (id(bare(module)) in wanted or any(id(parameter) in tensors for parameter in own)):
            kept.append(name)
    return kept


def named_outside(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every name of every module, and the module. What lies inside tuner layers and wrappers is left out."""
    within: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if name.startswith(tuple(within)):
            continue
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper, OpenedModule)):
            within.append(f"{name}.")
        yield name, module


def members(model: nn.Module, names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the modules and parameters that names stand for.

    A list of modules stands for its members. Modules without parameters are left out.

    Args:
        model: with or without adapters.
        names: full names of modules.

    Returns:
        Full names of modules, and full names of parameters that a list holds itself.
    """
    modules: list[str] = []
    parameters: list[str] = []
    for name in names:
        module = model.get_submodule(name)
        if isinstance(module, LISTS):
            parameters += [f"{name}.{key}" for key, _ in module.named_parameters(recurse=False)]
            inner = members(model, [f"{name}.{key}" for key, _ in module.named_children()])
            modules, parameters = modules + inner[0], parameters + inner[1]
        elif size(module):
            modules.append(name)
    return modules, parameters


def bare(module: Any) -> Any:
    """Return the module of the base model that a tuner layer or a wrapper stands for, or the module itself."""
    if isinstance(module, AuxiliaryTrainingWrapper):
        return module.original_module
    return module.get_base_layer() if isinstance(module, (BaseTunerLayer, OpenedModule)) else module


def size(module: nn.Module) -> int:
    """Return the number of parameters, without copies that adapters train."""
    return sum(p.numel() for name, p in module.named_parameters() if "modules_to_save" not in name.split("."))
