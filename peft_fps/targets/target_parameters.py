"""The parameters that are adapted although no layer owns them: weights of all experts of a block in one tensor."""

import re
import warnings
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from peft_fps.base.attention import Projection, has_projections
from peft_fps.base.head import Head
from peft_fps.base.module_names import bare
from peft_fps.base.opening import module_at
from peft_fps.config import FPSConfig
from peft_fps.layers.layer_types import LAYERS, layer_class
from peft_fps.targets.base_parameters import count_base_parameters, named_base_modules
from peft_fps.targets.default_targets import in_wanted_block
from peft_fps.targets.obstacle import is_offloaded


def default_parameters(model: nn.Module, config: FPSConfig, head: Head) -> list[str]:
    """Return the paths of all packed experts that can be adapted. A warning names the others.

    `layers_to_transform` limits them to some blocks.

    Args:
        model: base model, with or without adapters.
        config: gives `layers_to_transform` and `layers_pattern`.
        head: of the model.
    """
    packed = packed_experts(model, config)
    unfit = {path: why for path in packed if (why := parameter_obstacle(model, path))}
    if unfit:
        share = sum(packed[path].numel() for path in unfit) / count_base_parameters(model, head)
        first = next(iter(unfit))
        names = [*unfit][:2] + (["..."] if len(unfit) > 2 else [])
        warnings.warn(
            f"{', '.join(names)}: {len(unfit)} tensors with {share:.0%} of the base model's parameters hold the "
            f"weights of many experts each and cannot be adapted, {first} because {unfit[first]}. They stay frozen "
            "and the budget goes to the other layers. Pass target_modules to choose layers without this warning.",
            stacklevel=2,
        )
    return [path for path in packed if path not in unfit]


def packed_experts(model: nn.Module, config: FPSConfig) -> dict[str, nn.Parameter]:
    """Return the parameters that hold the weights of all experts in one tensor, by name; their biases are left out.

    transformers keeps most experts so. The class of the module tells (`MixtralExperts` and so on).
    `layers_to_transform` limits them to some blocks.
    """
    wholes = tuple(f"{name}." for name, part in model.named_modules() if isinstance(part, AuxiliaryTrainingWrapper))
    return {
        f"{name}.{own}": parameter
        for name, module in named_base_modules(model)
        if "expert" in type(module).__name__.lower()
        and not isinstance(module, tuple(LAYERS))
        and not name.startswith(wholes)
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.dim() > 1
        and not (own.endswith("_bias") and own.removesuffix("_bias") in module._parameters)
        and in_wanted_block(f"{name}.{own}", config)
    }


def named_parameters(model: nn.Module, config: FPSConfig) -> list[str]:
    """Return the paths of the parameters that `target_parameters` names, in the model's order.

    A name is a path or the end of one behind a dot. `layers_to_transform` limits ends of paths to some blocks.

    Raises:
        ValueError: a name is that of no parameter.
    """
    names = config.target_parameters or []
    paths = [
        f"{name}.{own}".lstrip(".")
        for name, module in named_base_modules(model)
        for own, _ in (module.named_parameters(recurse=False) if names else ())
    ]
    for name in names:
        if not any(f".{path}".endswith(f".{name}") for path in paths):
            raise ValueError(
                f"target_parameters names {name!r}, expected the path, or the end of the path behind a dot, of a "
                f"parameter of the {type(model).__name__}. Look it up in model.named_parameters()."
            )
    return [
        path
        for path in paths
        if path in names or (path.endswith(tuple(f".{name}" for name in names)) and in_wanted_block(path, config))
    ]


def is_excluded(path: str, config: FPSConfig) -> bool:
    """Return whether `exclude_modules` names a parameter, or the module that owns it."""
    excluded, owner = config.exclude_modules, path.rpartition(".")[0]
    if isinstance(excluded, str):
        return any(re.fullmatch(excluded, name) is not None for name in (path, owner))
    return any(f".{name}".endswith(f".{end}") for end in excluded or () for name in (path, owner))


def parameter_obstacle(model: nn.Module, path: str) -> str | None:
    """Return what keeps a parameter from a sparse change, for a message. None if nothing does.

    Args:
        model: base model, with or without adapters.
        path: of a parameter.
    """
    packed: Any = bare(module_at(model, path))
    weight, owner = packed.weight, packed.owner
    kind = type(owner).__name__
    if "." not in path:
        return f"it lies in the {kind} itself, expected a parameter of a module inside the model"
    attention = isinstance(packed, Projection)
    if layer_class(owner) is not None and not attention:
        return f"it belongs to a {kind}, which target_modules can name, expected a parameter of no such layer"
    if has_projections(owner) and not attention:
        return f"it belongs to a {kind}, whose in_proj and out_proj target_modules can name"
    if type(owner).__module__.startswith("torch.") and not attention:
        return f"it belongs to a {kind}, expected a module that multiplies its input with parts of the parameter"
    if hasattr(weight, "ds_id"):
        whole = tuple(getattr(weight, "ds_shape", ()))
        return (
            f"it is partitioned by DeepSpeed's ZeRO stage 3 (shape {tuple(weight.shape)}, whole {whole}), expected a "
            "whole weight to select entries of. Use stage 1 or 2, which leave parameters whole"
        )
    if weight.dim() != (2 if attention else 3) or not weight.is_floating_point() or weight.numel() == 0:
        return (
            f"it has dtype {weight.dtype} and shape {tuple(weight.shape)}, expected a floating tensor of three "
            "dimensions, one matrix per expert"
        )
    if is_offloaded(owner):
        return "accelerate offloads it, expected a tensor at hand"
    layers = [name for name, part in owner.named_modules() if name and layer_class(part) is not None]
    if layers and not attention:
        return f"its module has layers beside its parameters ({layers[0]}), expected parameters alone"
    return None
