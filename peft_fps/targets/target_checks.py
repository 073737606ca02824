"""What is checked of an adapter's name and of its targets before anything changes."""

from collections.abc import Iterable
from typing import Any

from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from peft_fps.base.attention import Projection
from peft_fps.base.module_names import bare
from peft_fps.base.opening import module_at
from peft_fps.base.packed_weight import OpenedModule, PackedWeight
from peft_fps.base.quantisation import check_quantised, quantisation, stored_weight
from peft_fps.base.substitution import overrides_forward
from peft_fps.checkpoint import PEFT_PREFIX, PREFIX, TENSORS
from peft_fps.config import FPSConfig
from peft_fps.layers.fps_layer import FPSLayer
from peft_fps.layers.layer_types import LAYERS, layer_class
from peft_fps.layers.norm import Norm, is_biased_norm
from peft_fps.targets.base_parameters import base_parameters, named_base_modules
from peft_fps.targets.obstacle import check_weight, obstacle, remedy
from peft_fps.targets.target_parameters import parameter_obstacle
from peft_fps.targets.tied_weights import tie_obstacle


PATH_PARTS = {*PEFT_PREFIX.split("."), *TENSORS, "base_layer", "modules_to_save", "original_module"}
PATH_PARTS |= {"_orig_mod", "_fsdp_wrapped_module"}
"""What PEFT, `torch.compile` and FSDP add to the paths of a model."""


def check_adapter_name(model: nn.Module, adapter_name: Any) -> None:
    """Check the name of a new adapter.

    Args:
        model: base model, with or without adapters.
        adapter_name: the name, of any type.

    Raises:
        TypeError: the name is no string.
        ValueError: the name is empty, has a dot, is reserved, is one that torch refuses, or is part of a module's
            path, by which PEFT would confuse tensors.
    """
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


def check_named_modules(model: nn.Module, config: FPSConfig) -> None:
    """Raise ValueError if a name in `target_modules` is a parameter's, which PEFT would pass over silently."""
    wanted = config.target_modules
    if not isinstance(wanted, (list, set)) or wanted == config.filled_in.target_modules:
        return
    modules = dict(named_base_modules(model))
    ends = {f".{target}" for target in wanted if not any(f".{name}".endswith(f".{target}") for name in modules)}
    for name, _ in base_parameters(model) if ends else ():
        owner, _, own = name.rpartition(".")
        if owner in modules and f".{name}".endswith(tuple(ends)):
            module = modules[owner]
            advice = f"Name the module, {owner}." if layer_class(module) else remedy(module)
            raise ValueError(
                f"{name}, named in target_modules, is the parameter {own} of a {type(module).__name__}, expected the "
                f"name of a module. {advice}"
            )


def check_target(model: nn.Module, name: str, norms: bool = False, *, chosen: bool = False) -> Any:
    """Return the base layer at `name` if it can carry a sparse change, or, with `norms`, a change of a norm's bias.

    Args:
        model: base model, with or without adapters.
        name: path of the module, or of a parameter.
        norms: accept a norm.
        chosen: `default_targets` has chosen the module, and has made the checks that cost time.

    Raises:
        ValueError: says what stands there, what is expected, and what to do.
    """
    module: Any = module_at(model, name)
    if isinstance(module, OpenedModule):
        module = module.base_layer
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
        # of transformers' Conv1D and torch's Conv1d, a reader is to see which is which
        named = (
            base.__name__ if base.__module__.startswith("torch") else f"transformers' {base.__name__}"
            for base in LAYERS
        )
        supported = ", ".join(named)
        raise ValueError(f"{name} is a {type(module).__name__}, expected one of {supported}. {remedy(module)}")
    if isinstance(module, PackedWeight):
        if found := parameter_obstacle(model, name):
            raise ValueError(f"{name}: {found}. Leave it out of the targets.")
        return module
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
    offloaded = weight.device.type == "meta" and "disk" in (getattr(model, "hf_device_map", None) or {}).values()
    if offloaded and not any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise ValueError(
            f"{name}.weight is offloaded to disk, and accelerate's hooks that bring it are gone, expected them in "
            "place: PeftModel.from_pretrained takes them off a model with hf_device_map, and would then offload the "
            "adapter's values along, where the method cannot reach them. Load the base model anew, and del "
            "model.hf_device_map before PeftModel.from_pretrained."
        )


def check_gated(model: nn.Module, config: Any, names: Iterable[str]) -> None:
    """Raise ValueError if gates are asked for, and a target does nothing that can be told from its change.

    Such are quantised layers, those with a forward of their own, embeddings, and weights that no layer owns.

    Args:
        model: base model, with or without adapters.
        config: of the adapter.
        names: paths of its targets.
    """
    if config.token_gate is None:
        return
    unfit = {name: why for name in names if (why := _why_ungated(bare(module_at(model, name))))}
    if unfit:
        found = ", ".join(f"{name} ({why})" for name, why in unfit.items())
        raise ValueError(
            f"{found}: expected plain layers alone with token_gate, which compares a layer's change with its product. "
            f"Leave them out with exclude_modules={[*unfit]}. Nothing was changed."
        )


def _why_ungated(base: Any) -> str | None:
    """Return why the change of a base layer cannot have a gate, for an error. None if it can."""
    if quantisation(base) is not None:
        return "quantised"
    if isinstance(base, PackedWeight):
        return "multiplied by the module that owns it"
    if isinstance(base, nn.Embedding):
        return "looks tokens up"
    return "has a forward of its own" if overrides_forward(base) else None


def check_untied(model: nn.Module, names: list[str]) -> None:
    """Raise ValueError if a targeted module or its weight is used elsewhere too. A merge would change both.

    The weight of an embedding may also be that of linear layers and other embeddings, which follow its changes.

    Args:
        model: base model, with or without adapters.
        names: paths of the targeted modules.
    """
    packed = {name: bare(found) for name in names if isinstance(bare(found := module_at(model, name)), PackedWeight)}
    wanted = {name.rpartition(".")[0] if name in packed else name for name in names}
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
        if name in packed:
            outer = isinstance(packed[name], Projection) and packed[name].own == "out_proj"
            targeted[id(packed[name].weight)] = name if outer else name.rpartition(".")[0], packed[name].name
        elif is_biased_norm(base_layers[name]):
            targeted[id(base_layers[name].bias)] = name, "bias"
        else:
            targeted[id(stored_weight(base_layers[name]))] = name, "weight"
    for owner, module in named_base_modules(model):
        for own, parameter in module.named_parameters(recurse=False):
            name, written = targeted.get(id(parameter), (owner, own))
            if owner == name:
                continue
            tied = f"{name}.{written} is the same tensor as {owner}.{own} (tied weights)"
            if owner in wanted and isinstance(base_layers[owner], nn.Embedding):
                raise ValueError(
                    f"{tied}, and target_modules names both, expected one of them: an embedding's changes count in "
                    f"all modules that share its weight. Name {owner} alone."
                )
            if found := tie_obstacle(base_layers[name], module, own):
                advice = f", or name the embedding {owner}, whose changes count in both" if _leads(module) else ""
                raise ValueError(
                    f"{tied}, {found}: merging would change {owner} along. Leave {name} out with exclude_modules, or "
                    f"untie the weights{advice}."
                )


def _leads(module: nn.Module) -> bool:
    """Return whether a module can be targeted for all that share its weight."""
    return isinstance(module, nn.Embedding) and obstacle(module) is None
