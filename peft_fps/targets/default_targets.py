"""Which modules of a model are adapted, and what the budget counts."""

import re
import warnings
from collections.abc import Iterator
from typing import Any

from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from peft_fps.base.head import find_head, output_head
from peft_fps.base.quantisation import check_quantised, quantisation, quantised_elements, stored_weight
from peft_fps.checkpoint import PEFT_PREFIX, PREFIX, TENSORS
from peft_fps.config import FPSConfig
from peft_fps.layers.fps_layer import FPSLayer
from peft_fps.layers.layer_types import LAYERS, entry_layer_class, layer_class
from peft_fps.layers.norm import Norm, is_biased_norm
from peft_fps.targets.obstacle import check_weight, obstacle, remedy


PATH_PARTS = {*PEFT_PREFIX.split("."), *TENSORS, "base_layer", "modules_to_save", "original_module"}
PATH_PARTS |= {"_orig_mod", "_fsdp_wrapped_module"}
"""What PEFT, `torch.compile` and FSDP add to the paths of a model."""


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield name and parameter of everything that belongs to the base model, adapters left out, each once."""
    seen: set[int] = set()
    for name, parameter in _all_names_of_parameters(model):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            yield name, parameter


def _all_names_of_parameters(module: Any, path: str = "") -> Iterator[tuple[str, nn.Parameter]]:
    if isinstance(module, BaseTunerLayer):
        yield from _all_names_of_parameters(module.get_base_layer(), path)
    elif isinstance(module, AuxiliaryTrainingWrapper):
        yield from _all_names_of_parameters(module.original_module, path)
    else:
        for name, parameter in module.named_parameters(recurse=False):
            yield f"{path}{name}", parameter
        for name, child in module.named_children():
            yield from _all_names_of_parameters(child, f"{path}{name}.")


def count_base_parameters(model: nn.Module) -> int:
    """Return the number of parameters of the base model without its output head: what a budget is a share of.

    Of what the head shares with the rest (output embeddings that are tied to the input embeddings), the rest is the
    owner. A packed weight counts as many as it stands for, so that a quantised model has as many parameters as before.
    """
    head = find_head(model)
    left_out = tuple(f"{name}." for name in [*head.modules, *head.output_embeddings])
    counted = {
        id(parameter): parameter
        for name, parameter in _all_names_of_parameters(model)
        if not name.startswith(left_out) and name not in head.parameters
    }
    packed = {id(stored_weight(m)): quantised_elements(m) for m in model.modules() if quantisation(m) is not None}
    return sum(packed.get(key) or _elements(parameter) for key, parameter in counted.items())


def _elements(parameter: nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)  # 4-bit embeddings and experts
    return parameter.numel() if state is None else int(state.shape.numel())


def default_targets(model: nn.Module, config: FPSConfig) -> set[str]:
    """Return the names of all linear and convolutional layers outside the output head that can be adapted.

    With `layers_to_transform`, only of those blocks, as PEFT counts them: by the first number in a module's path, or
    by the one behind `layers_pattern`. Warns of packed experts, which are left out.
    """
    _warn_of_packed_experts(model, config)
    heads = output_head(model)
    inside = tuple(f"{head}." for head in heads)
    # the latter is what other adapters train whole
    apart = (nn.MultiheadAttention, AuxiliaryTrainingWrapper)
    skipped = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, apart))
    found = {
        name: module
        for name, module in named_base_modules(model)
        if entry_layer_class(module) is not None
        and name not in heads
        and not name.startswith((*inside, *skipped))
        and in_wanted_block(name, config)
    }
    unfit = {name: why for name, module in found.items() if (why := obstacle(module, certain=True))}
    if unfit:
        kinds = "; ".join(f"{name}: {why}" for name, why in _first_of_each(unfit).items())
        warnings.warn(
            f"{len(unfit)} of {len(found)} layers are left out of the targets and stay frozen: {kinds}."
            f" All of them: {', '.join(unfit)}. Pass target_modules to choose layers without this warning.",
            stacklevel=2,
        )
    return found.keys() - unfit.keys()


def _first_of_each(reasons: dict[str, str]) -> dict[str, str]:
    """Return of the modules that share a reason the first one alone."""
    first = {reason: name for name, reason in reversed(reasons.items())}
    return {name: reason for name, reason in reasons.items() if first[reason] == name}


def packed_experts(model: nn.Module, config: FPSConfig) -> dict[str, nn.Parameter]:
    """Return the parameters that hold a weight of every expert in one tensor, by name; transformers keeps most so.

    They are told by their module's class (`MixtralExperts` and so on); `layers_to_transform` limits them.
    """
    return {
        f"{name}.{own}": parameter
        for name, module in named_base_modules(model)
        if "expert" in type(module).__name__.lower() and not isinstance(module, tuple(LAYERS))
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.dim() > 1 and in_wanted_block(f"{name}.{own}", config)
    }


def _warn_of_packed_experts(model: nn.Module, config: FPSConfig) -> None:
    packed = packed_experts(model, config)
    if not packed:
        return
    share = sum(parameter.numel() for parameter in packed.values()) / count_base_parameters(model)
    names = [*packed][:2] + (["..."] if len(packed) > 2 else [])
    warnings.warn(
        f"{', '.join(names)}: {len(packed)} tensors with {share:.0%} of the base model's parameters hold the weights "
        "of many experts each, which FPS cannot adapt; it expects linear or convolutional layers. The experts stay "
        "frozen and the whole budget goes to the other layers. Pass target_modules to choose layers without this "
        "warning.",
        stacklevel=2,
    )


def biased_norms(model: nn.Module, config: FPSConfig) -> set[str]:
    """Return the names of all LayerNorms with a bias outside the output head; `layers_to_transform` limits them."""
    heads = output_head(model)
    wholes = [name for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    inside = tuple(f"{head}." for head in [*heads, *wholes])
    return {
        name
        for name, module in named_base_modules(model)
        if is_biased_norm(module)
        and name
        and name not in heads
        and not name.startswith(inside)
        and in_wanted_block(name, config)
    }


def in_wanted_block(name: str, config: FPSConfig) -> bool:
    """Whether a module path lies in one of the blocks that `layers_to_transform` names, or none are named."""
    wanted, patterns = config.layers_to_transform, config.layers_pattern
    if wanted is None:
        return True
    lists = ["[^.]*"] if not patterns else [patterns] if isinstance(patterns, str) else patterns
    found = next((match for part in lists if (match := re.match(rf"(?:^|.*?\.){part}\.(\d+)\.", name))), None)
    return found is not None and int(found[1]) in ([wanted] if isinstance(wanted, int) else wanted)


def named_base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and module as in the model before any adapter: tuner layers stand for their base layers."""
    within: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(outer) for outer in within):
            continue
        if isinstance(module, BaseTunerLayer):
            within.append(f"{name}.")
            yield name, module.get_base_layer()
        else:
            yield name, module


def check_adapter_name(model: nn.Module, adapter_name: Any) -> None:
    """Raise TypeError or ValueError for a name that torch refuses, or by which PEFT would confuse tensors."""
    if not isinstance(adapter_name, str):
        kind = type(adapter_name).__name__
        raise TypeError(f"The adapter's name is {adapter_name!r} of type {kind}, expected a string.")
    if not adapter_name or "." in adapter_name:
        raise ValueError(
            f"The adapter's name is {adapter_name!r}, expected one that is not empty and has no dot, which divides "
            "the parts of a module's path. Choose another adapter name."
        )
    if adapter_name == "__base__":
        raise ValueError(
            f"The adapter's name {adapter_name!r} stands for the base model in `adapter_names=[...]`. Choose another "
            "adapter name."
        )
    holders: tuple[Any, ...] = (nn.ModuleDict(), nn.ParameterDict(), BufferDict(persistent=True))
    if any(hasattr(holder, adapter_name) for holder in holders):
        raise ValueError(
            f"The adapter's name {adapter_name!r} is also an attribute of torch's modules, which for that reason "
            "cannot hold an adapter under it. Choose another adapter name."
        )
    names = [name for name, _ in base_parameters(model)]
    names += [name for name, _ in model.named_buffers() if f".{PREFIX}" not in name]
    if adapter_name in {part for name in names for part in name.split(".")} | PATH_PARTS:
        raise ValueError(
            f"The adapter's name {adapter_name!r} is also part of a module's path, by which PEFT would confuse their "
            "tensors when saving. Choose another adapter name."
        )


def check_target(model: nn.Module, name: str, norms: bool = False, *, chosen: bool = False) -> Any:
    """Return the base layer at `name` if it can carry a sparse change, or, with `norms`, a change of a norm's bias.

    Args:
        model: base model, with or without adapters.
        name: path of the module.
        norms: whether a norm will do.
        chosen: whether `default_targets` has chosen it, which looks at what costs time.

    Raises:
        ValueError: says what stands there, what is expected, and what to do.
    """
    module: Any = model.get_submodule(name)
    if isinstance(module, BaseTunerLayer):
        if not isinstance(module, FPSLayer):
            raise ValueError(
                f"{name} already carries an adapter of another method, {type(module).__module__}."
                f"{type(module).__name__}, expected a base layer. Merge or unload that adapter first."
            )
        module = module.get_base_layer()
    if PREFIX in name:
        raise ValueError(
            f"{name} contains {PREFIX!r}, by which PEFT and transformers recognise this method's own tensors: "
            "deleting and loading adapters would go wrong silently. Rename the module, or leave it out with "
            "exclude_modules."
        )
    kind = layer_class(module)
    if kind is None or (kind is Norm and not norms):
        supported = ", ".join(base.__name__ for base in LAYERS)
        raise ValueError(f"{name} is a {type(module).__name__}, expected one of {supported}. {remedy(module)}")
    parent_name, _, own = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    if isinstance(parent, nn.MultiheadAttention):
        raise ValueError(
            f"{name} is read by torch.nn.MultiheadAttention without calling it, so an adapter there would have no "
            "effect. Leave it out with exclude_modules."
        )
    if quantisation(module) is not None:
        check_quantised(name, module)
        _check_at_hand(model, name, stored_weight(module))
        return module
    for own in () if chosen else ("weight", "bias") if kind is Norm else ("weight",):
        if found := obstacle(module, own):
            raise ValueError(f"{name}: {found}. Mend that, or leave the module out with exclude_modules.")
    _check_at_hand(model, name, module.weight)
    check_weight(name, module, dimensions=1 if kind is Norm else 2)
    return module


def _check_at_hand(model: nn.Module, name: str, weight: Tensor) -> None:
    """Raise ValueError for an offloaded weight that nothing brings any more."""
    offloads = "disk" in (getattr(model, "hf_device_map", None) or {}).values()
    hooked = any(hasattr(module, "_hf_hook") for module in model.modules())
    if weight.device.type == "meta" and offloads and not hooked:
        raise ValueError(
            f"{name}.weight is offloaded to disk, and accelerate's hooks that bring it are gone, expected them in "
            "place: PeftModel.from_pretrained takes them off a model with hf_device_map, and would then offload the "
            "adapter's values along, where the method cannot reach them. Load the base model anew, and del "
            "model.hf_device_map before PeftModel.from_pretrained."
        )


def check_untied(model: nn.Module, names: list[str]) -> None:
    """Raise ValueError if a targeted module or its weight is used elsewhere too, which a merge would change along."""
    wanted = set(names)
    base_layers: dict[str, Any] = {name: module for name, module in named_base_modules(model) if name in wanted}
    bases = {id(module): name for name, module in base_layers.items()}
    for alias, module in model.named_modules(remove_duplicate=False):
        name = bases.get(id(module))
        if name is not None and alias != name and not alias.startswith(f"{name}."):
            raise ValueError(
                f"{name} and {alias} are the same module, expected a module with one name: an adapter would act under "
                "one of them, a merge under both. Leave it out with exclude_modules, or copy the module."
            )
    targeted = {}
    for name in names:
        if is_biased_norm(base_layers[name]):
            targeted[id(base_layers[name].bias)] = name, "bias"
        else:
            targeted[id(stored_weight(base_layers[name]))] = name, "weight"
    for owner, module in named_base_modules(model):
        for own, parameter in module.named_parameters(recurse=False):
            name, written = targeted.get(id(parameter), (owner, own))
            if owner != name:
                raise ValueError(
                    f"{name}.{written} is the same tensor as {owner}.{own} (tied weights), expected a {written} of "
                    f"its own: merging would change {owner} along. Leave {name} out with exclude_modules, or untie "
                    "the weights."
                )
