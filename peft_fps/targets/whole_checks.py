"""What is checked of modules that an adapter trains whole (`modules_to_save`) before anything changes."""

from collections.abc import Iterator, Sequence
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from peft_fps.base.quantisation import quantisation
from peft_fps.config import FPSConfig


def check_trainable_whole(model: nn.Module, path: str, config: FPSConfig) -> None:
    """Raise ValueError if a module is part of an adapter, offloaded or quantised. A copy of it would not learn.

    Args:
        model: base model, with or without other adapters.
        path: of the module.
        config: of the new adapter, for the error.
    """
    module = model.get_submodule(path)
    found = None
    if around := _around(model, path, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        found = f"a part of an adapter in {around}"
    elif isinstance(module, BaseTunerLayer):
        found = "a layer that carries sparse changes of another adapter"
    elif not isinstance(module, ModulesToSaveWrapper):
        inside = (
            name for name, part in module.named_modules() if isinstance(part, BaseTunerLayer | ModulesToSaveWrapper)
        )
        if (first := next(inside, None)) is not None:
            found = f"a module with a part that another adapter changes, {first}"
    if found:
        raise ValueError(
            f"{path} is to be trained whole (modules_to_save={config.modules_to_save}), but is {found}, expected a "
            f"module of the base model that no adapter has changed. {remedy_for(config)}"
        )
    if any(getattr(getattr(part, "_hf_hook", None), "offload", False) for part in module.modules()):
        raise ValueError(
            f"{path} is to be trained whole (modules_to_save), but accelerate offloads it, so that it would get "
            "no gradient. Keep it on a device with device_map, or pass modules_to_save=[]."
        )
    if any(quantisation(part) is not None for part in module.modules()):
        raise ValueError(
            f"{path} is to be trained whole (modules_to_save), but its weight is quantised, so that it gets no "
            "gradient. Leave it out when the model is quantised (llm_int8_skip_modules of BitsAndBytesConfig, "
            "modules_to_not_convert of others), or pass modules_to_save=[]."
        )


def check_whole_modules_apart(
    model: nn.Module, config: FPSConfig, wholes: Sequence[str], targets: Sequence[str]
) -> None:
    """Raise ValueError unless modules trained whole and targeted modules are apart.

    Args:
        model: base model, with or without other adapters.
        config: of the new adapter.
        wholes: from `whole_modules`.
        targets: paths of the modules that will have entries.
    """
    for target in targets:
        if wrapper := _around(model, target, AuxiliaryTrainingWrapper):
            raise ValueError(
                f"{target}: another adapter trains {wrapper} whole (modules_to_save), expected a target outside of "
                "it: the same weights cannot change in both ways. Leave it out with exclude_modules, or name "
                "target_modules."
            )
    if config.record is not None:
        for name in config.record.allocation:
            if path := next((path for path in wholes if f"{name}.".startswith(f"{path}.")), None):
                raise ValueError(
                    f"{name}: the adapter's config has entries for it, and trains {path} whole (modules_to_save="
                    f"{config.modules_to_save}), expected one of the two. {remedy_for(config)}"
                )


def check_whole_tensors(model: nn.Module, config: FPSConfig, wholes: Sequence[str]) -> None:
    """Raise ValueError unless a config from a file lists just the tensors of its modules that are trained whole.

    A config without a record passes.

    Args:
        model: base model, with or without other adapters.
        config: of the new adapter.
        wholes: paths of the modules that are to be trained whole.
    """
    if config.record is None:
        return
    expected = whole_tensors(model, wholes)
    listed = {name.replace("_orig_mod.", "") for name in config.record.whole_tensors or ()}
    if different := sorted(listed ^ {name.replace("_orig_mod.", "") for name in expected}):
        found = "lacks" if different[0] not in listed else "lists"
        names = config.modules_to_save
        wanted = f"the tensors of the modules that modules_to_save={names} names" if names else "only sparse tensors"
        raise ValueError(
            f"{different[0]}: whole_tensors of the adapter's config {found} this tensor ({len(different)} such), "
            f"expected {wanted}. {remedy_for(config)}"
        )


def whole_tensors(model: nn.Module, wholes: Sequence[str]) -> list[str]:
    """Return the names under which the tensors of modules that are trained whole are saved."""
    return [f"{path}.{name}" for path in wholes for name in _original(model.get_submodule(path)).state_dict()]


def _around(model: nn.Module, path: str, kinds: Any) -> str | None:
    """Return the path of a module of one of the kinds within which the path lies, None if there is none."""
    return next((outer for outer in _ancestors(path) if isinstance(model.get_submodule(outer), kinds)), None)


def _ancestors(path: str) -> Iterator[str]:
    """Return the paths of the modules around the one at a path, the outermost first."""
    parts = path.split(".")
    return (".".join(parts[:length]) for length in range(1, len(parts)))


def _original(module: nn.Module) -> nn.Module:
    """Return the module of the base model that PEFT's wrapper holds, or the module itself."""
    return module.original_module if isinstance(module, ModulesToSaveWrapper) else module


def remedy_for(config: FPSConfig) -> str:
    """Return what to do about names that do not fit."""
    if config.record is not None:
        return "The config is damaged or belongs to another model; fetch or save the adapter again."
    return "Pass modules_to_save with other names, or [] for none."
