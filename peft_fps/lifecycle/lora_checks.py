"""What is checked before FPS and LoRA adapters share a model: what adds up, and what they would both change."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from peft import PeftConfig, PeftType
from peft.tuners.mixed import MixedModel
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_fps.base.packed_weight import OpenedModule
from peft_fps.base.quantisation import quantisation
from peft_fps.config import FPSConfig


KINDS = (nn.Linear, Conv1D, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Base layers around which a LoRA layer adds its product to the output and nothing else."""

ADDING_INITS = (True, False, "gaussian", "orthogonal")
"""Values of `init_lora_weights` that leave the base weights alone."""

BEYOND_LAYERS = (
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
    "ensure_weight_tying",
    "megatron_config",
)
"""Fields of a `LoraConfig` that put something else than a LoRA layer around a layer."""


def check_methods(configs: Mapping[str, PeftConfig]) -> None:
    """Raise ValueError unless every adapter that shares a model with FPS adapters is a LoRA that only adds B A.

    Args:
        configs: of all adapters by name.
    """
    for name, config in configs.items():
        if isinstance(config, FPSConfig):
            continue
        if config.peft_type != PeftType.LORA:
            raise ValueError(
                f"Adapter {name!r} is a {type(config).__name__}, expected an FPSConfig or a LoraConfig: of PEFT's "
                "methods, only LoRA shares a model with FPS adapters. Give each a model of its own, or merge one "
                "first (model.merge_and_unload()). Nothing was changed."
            )
        if found := _beyond_addition(config):
            raise ValueError(
                f"Adapter {name!r} is a LoraConfig with {', '.join(found)}, expected one that only adds B A to frozen "
                "weights, since changes of both methods would not add up otherwise. Leave that out (FPSConfig has "
                "bias='all' for biases), or give each adapter a model of its own. Nothing was changed."
            )


def _beyond_addition(config: Any) -> list[str]:
    """Return the settings of a LoRA config with which it does more than add B A to frozen weights."""
    unlike = {field.name: bool(field.metadata.get("is_lora_variant")) for field in fields(config)}
    names = [name for name, variant in unlike.items() if variant or name in BEYOND_LAYERS]
    found = [f"{name}={getattr(config, name)!r}" for name in names if getattr(config, name)]
    if config.init_lora_weights not in ADDING_INITS:
        found.append(f"init_lora_weights={config.init_lora_weights!r}")
    if config.bias != "none":
        found.append(f"bias={config.bias!r}")
    return found


def check_lora_targets(model: nn.Module, config: Any, adapted: Iterable[str]) -> None:
    """Raise ValueError if a LoRA adapter targets or trains whole what it cannot beside FPS adapters.

    Args:
        model: base model without its FPS layers.
        config: of the LoRA adapter; stays as it is.
        adapted: paths of the modules that FPS adapters change.
    """
    trial: Any = copy.copy(config)
    if not trial.target_modules:
        MixedModel._prepare_adapter_config(trial, BaseTuner.get_model_config(model))
    _maybe_include_all_linear_layers(trial, model)
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if not path or path.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside = (*inside, f"{path}.")
        if check_target_module_exists(trial, path):
            check_lora_place(model, path, module)
    for name in config.modules_to_save or ():
        ends = [path for path, _ in model.named_modules() if path.endswith(name)]
        for path, other in ((path, other) for path in ends for other in adapted):
            if f"{other}.".startswith(f"{path}.") or path.startswith(f"{other}."):
                raise ValueError(
                    f"{other}: an FPS adapter changes it, and modules_to_save={config.modules_to_save} of the "
                    f"LoraConfig trains {path} whole, expected one of the two. Leave one out. Nothing was changed."
                )


def check_lora_place(model: nn.Module, path: str, module: Any) -> None:
    """Raise ValueError unless a LoRA layer can stand at a path of a base model beside FPS adapters.

    Args:
        model: base model.
        path: of the place.
        module: what stands there.
    """
    parts = path.split(".")
    for outer in (".".join(parts[:length]) for length in range(1, len(parts) + 1)):
        around = model.get_submodule(outer)
        if isinstance(around, (AuxiliaryTrainingWrapper, OpenedModule)):
            does = "is trained whole by" if isinstance(around, AuxiliaryTrainingWrapper) else "has parameters of"
            raise ValueError(
                f"{path} is a target of LoRA, but {outer} {does} another adapter, expected a target outside of it. "
                f"Name other target_modules, or pass exclude_modules='{outer}.*'. Nothing was changed."
            )
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if not isinstance(base, KINDS) or quantisation(base) is not None:
        found = "quantised" if quantisation(base) is not None else f"a {type(base).__name__}"
        raise ValueError(
            f"{path} is a target of LoRA and {found}, expected one of {', '.join(kind.__name__ for kind in KINDS)} "
            "with a dense weight, where LoRA and FPS share a model. Leave it out of LoRA's target_modules. Nothing "
            "was changed."
        )


def check_apart(lora: Iterable[str], wholes: Sequence[str], opened: Iterable[str]) -> None:
    """Raise ValueError if LoRA changes what a new FPS adapter trains whole, or a module that it opens.

    Args:
        lora: paths of the modules that LoRA adapters change.
        wholes: paths of the modules that the FPS adapter trains whole.
        opened: paths of the modules of which it adapts parameters, see `OpenedModule`.
    """
    for path in lora:
        if outer := next((whole for whole in wholes if f"{path}.".startswith(f"{whole}.")), None):
            raise ValueError(
                f"{path}: a LoRA adapter changes it, and the FPS adapter trains {outer} whole (modules_to_save), "
                "expected one of the two. Leave it out of LoRA's target_modules, or pass FPSConfig("
                "modules_to_save=[]). Nothing was changed."
            )
        if outer := next((owner for owner in opened if path.startswith(f"{owner}.")), None):
            raise ValueError(
                f"{path}: a LoRA adapter changes it, and the FPS adapter changes parameters of {outer}, expected one "
                f"of the two. Leave {outer} out with exclude_modules. Nothing was changed."
            )


def check_one_whole(model: nn.Module, adapter_names: Sequence[str]) -> None:
    """Raise ValueError if several of the adapters train the same module whole, of which only one copy can run.

    Args:
        model: has the adapters.
        adapter_names: those that are to be active together.
    """
    for path, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            found = [name for name in adapter_names if name in module.modules_to_save]
            if len(found) > 1:
                raise ValueError(
                    f"{path}: the adapters {found} each train this module whole (modules_to_save), expected at most "
                    "one of those that are active together. Make the others without it: FPSConfig("
                    "modules_to_save=[]), or a LoraConfig without modules_to_save. Nothing was changed."
                )
