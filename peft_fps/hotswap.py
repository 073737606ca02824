"""Replace a loaded adapter by another one in place: name, layers and parameters stay, what they hold changes.

`peft.utils.hotswap` does the same for LoRA alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils import infer_device, load_peft_weights
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from peft_fps.adapters import FPSLayer
from peft_fps.checkpoint import (
    PEFT_PREFIX,
    TENSORS,
    Expected,
    check_adapter_tensors,
    check_whole_modules,
    decode,
)
from peft_fps.checkpoint.record import AdapterRecord
from peft_fps.compiled import plain_name, unwrapped
from peft_fps.config import FPSConfig
from peft_fps.config_lookup import adapter_config
from peft_fps.entry_layer import EntryLayer
from peft_fps.lookup import base_model, target_layers
from peft_fps.planning import plan, take_targets_from_record
from peft_fps.renames import current_names
from peft_fps.whole_checks import check_whole_modules_apart, check_whole_tensors
from peft_fps.whole_modules import whole_modules


TRAINED = ("fps_values", "fps_bias")
ADVICE = "Load it under a name of its own with model.load_adapter instead. Nothing was changed."


@dataclass(frozen=True)
class _Swap:
    """What replaces an adapter, complete and checked, on the devices where it goes.

    Attributes:
        layers: for each layer its tensors by name.
        wholes: tensors of modules that are trained whole, and what they are to hold.
    """

    layers: list[tuple[FPSLayer, dict[str, Tensor]]]
    wholes: list[tuple[Tensor, Tensor]]


def hotswap_adapter(
    model: nn.Module, model_name_or_path: str, adapter_name: str, torch_device: str | None = None, **kwargs: Any
) -> None:
    """Replace what an adapter holds by a saved adapter, which may have other entries, and other numbers of them.

    Everything is read and checked before anything changes. Modules of the adapter that the saved one leaves out keep
    no changes; a module that only the saved one has is refused. The adapter gets the saved one's config, and 1 as its
    scale. A compiled model gives the new results; it compiles anew where the number of entries of a layer changes.

    Args:
        model: a model with the adapter, compiled or not.
        model_name_or_path: folder, or name on the Hub, of the saved adapter.
        adapter_name: of the adapter that is replaced.
        torch_device: where the file is read to; PEFT's choice if None.
        kwargs: `check_base` as in `FPSConfig`, `subfolder`, `revision`, and what else PEFT passes on to the Hub.

    Raises:
        ValueError: there is no such adapter, it is merged or not loaded, or the saved one is damaged, made for other
            base weights, or has other modules or bias deltas. The model is unchanged then.
    """
    with torch.inference_mode(False):  # what is written during inference must serve training later
        _swap(unwrapped(model), model_name_or_path, adapter_name, torch_device, kwargs)


def _swap(model: nn.Module, path: str, adapter_name: str, device: str | None, options: dict[str, Any]) -> None:
    old, layers = adapter_config(model, adapter_name), target_layers(model, adapter_name)
    _check_present(layers, adapter_name)
    config = _checked_config(FPSConfig.from_pretrained(path, **options), old, model, adapter_name, layers)
    options = {key: value for key, value in options.items() if key != "check_base"}
    state_dict = load_peft_weights(path, device=infer_device() if device is None else device, **options)
    _put(layers, _prepare(model, config, adapter_name, layers, state_dict), adapter_name)
    config.inference_mode = old.inference_mode
    state = next(iter(layers.values())).fps_state[adapter_name]
    record = _record_of(config)
    state.selected, state.calibration, state.saved_inputs = True, record.calibration, config.saved_inputs
    state.unreached.difference_update(record.allocation)
    state.before = state.evaluation = None
    for module in model.modules():
        configs = module.__dict__.get("peft_config")
        if isinstance(configs, dict) and adapter_name in configs:
            configs[adapter_name] = config


def _check_present(layers: Mapping[str, FPSLayer], adapter_name: str) -> None:
    for path, layer in layers.items():
        if adapter_name in layer.merged_adapters:
            raise ValueError(
                f"{path}: adapter {adapter_name!r} is merged into the base weights, expected an unmerged adapter to "
                "replace. Call model.unmerge_adapter() first. Nothing was changed."
            )
        if any(parameter.device.type == "meta" for parameter in layer.adapter_parameters(adapter_name)):
            raise ValueError(
                f"{path}: adapter {adapter_name!r} is on the meta device, expected loaded tensors to replace. Load an "
                "adapter file first. Nothing was changed."
            )


def _checked_config(
    found: Any, old: FPSConfig, model: nn.Module, adapter_name: str, layers: Mapping[str, FPSLayer]
) -> FPSConfig:
    """Return the saved adapter's config if it fits the place, with its modules under their present names."""
    if not isinstance(found, FPSConfig) or found.record is None:
        kind = type(found).__name__
        raise ValueError(f"The saved adapter has a {kind} without saved entries, expected an FPSConfig. {ADVICE}")
    found.check_complete()
    if found.bias != old.bias:
        raise ValueError(
            f"The saved adapter has bias={found.bias!r}, expected {old.bias!r} as the adapter that it replaces has. "
            f"{ADVICE}"
        )
    whole, present = set(found.record.whole_tensors or ()), set(_whole_tensors(model, adapter_name))
    if whole != present:
        raise ValueError(
            f"The saved adapter trains {sorted(whole) or 'nothing'} whole (modules_to_save), expected "
            f"{sorted(present) or 'nothing'} as the adapter that it replaces does. {ADVICE}"
        )
    base = base_model(model)
    take_targets_from_record(found, found.record)
    wholes = whole_modules(base, found)
    names = current_names(base, found.record.allocation)
    if unknown := [name for name in names if name not in layers]:
        raise ValueError(
            f"{unknown[0]}: the saved adapter changes this module ({len(unknown)} like it), expected modules of the "
            f"adapter that it replaces alone. {ADVICE}"
        )
    saved_names = dict(zip(names, found.record.allocation, strict=True))
    found.record = found.record.renamed(names)
    check_whole_modules_apart(base, found, wholes, list(names))
    plan(base, found, list(names), saved_names)
    check_whole_tensors(base, found, wholes)
    return found


def _record_of(config: FPSConfig) -> AdapterRecord:
    """Return the record of a config that `_checked_config` has checked."""
    assert config.record is not None
    return config.record


def _prepare(
    model: nn.Module,
    config: FPSConfig,
    adapter_name: str,
    layers: Mapping[str, FPSLayer],
    state_dict: Mapping[str, Tensor],
) -> _Swap:
    """Check all tensors of the file, and return them as the model will hold them."""
    modules: dict[str, dict[str, Tensor]] = {}
    others = {}
    for key, tensor in state_dict.items():
        path, _, name = key.removeprefix(PEFT_PREFIX).rpartition(".")
        if name in TENSORS:
            modules.setdefault(path, {})[name] = tensor
        else:
            others[key.removeprefix(PEFT_PREFIX)] = tensor
    modules = current_names(base_model(model), modules)
    expected = {
        path: Expected(sizes.neurons, sizes.inputs, sizes.entries, adapter_name in layers[path].fps_bias)
        for path, sizes in _record_of(config).allocation.items()
    }
    check_adapter_tensors(modules, expected)
    wholes = _whole_tensors(model, adapter_name)
    check_whole_modules(others, wholes)
    return _Swap(
        [(layer, _held(layer, adapter_name, modules.get(path, {}))) for path, layer in layers.items()],
        [(wholes[key], tensor.to(wholes[key].device, wholes[key].dtype)) for key, tensor in others.items()],
    )


def _whole_tensors(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """The tensors of modules that the adapter trains whole, by their keys in a file."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            tensors = module.state_dict(keep_vars=True)
            place = plain_name(path).removeprefix(PEFT_PREFIX)
            for key, stored in module.adapter_state_dict_load_map(adapter_name).items():
                found[f"{place}.{key}"] = tensors[stored]
    return found


def _held(layer: FPSLayer, adapter_name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a layer's tensors on its device, never narrower than the file; no entries where the file has none."""
    held = {}
    for name in layer.tensor_names():
        if adapter_name not in getattr(layer, name):
            continue
        present = getattr(layer, name)[adapter_name].detach()
        if tensors:
            held[name] = decode(name, tensors[name]).to(present.device)
        else:
            held[name] = present[:0] if name in ("fps_values", "fps_columns") else torch.zeros_like(present)
        if name in TRAINED:
            held[name] = held[name].to(torch.promote_types(present.dtype, held[name].dtype))
    return held


@torch.no_grad()
def _put(layers: Mapping[str, FPSLayer], swap: _Swap, adapter_name: str) -> None:
    for layer, tensors in swap.layers:
        for name, tensor in tensors.items():
            held = getattr(layer, name)
            old = held[adapter_name]
            if old.shape == tensor.shape and old.dtype == tensor.dtype and not old.is_inference():
                old.copy_(tensor)  # in the same memory, which compiled graphs may have noted
            elif name in TRAINED:
                old.data = tensor
            else:
                held[adapter_name] = tensor
        for parameter in layer.adapter_parameters(adapter_name):
            parameter.grad = None
        layer.scaling[adapter_name] = 1.0
    for target, tensor in swap.wholes:
        target.copy_(tensor)
    for layer in layers.values():
        # a compiled forward reads what is derived here and does not look whether it is up to date
        layer.prepare(adapter_name)
        names = [name for name in layer.active_adapters if name in layer.fps_state]
        if len(names) > 1 and isinstance(layer, EntryLayer):
            layer.united_structure(names)
