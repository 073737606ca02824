"""The hot-swap: a saved adapter replaces a loaded one in place, so that name, layers and parameters stay.

`peft.utils.hotswap` does the same for LoRA alone.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from peft.utils import infer_device, load_peft_weights
from torch import Tensor, nn

from peft_fps.base.compiled import unwrapped
from peft_fps.base.renamed_modules import current_names
from peft_fps.checkpoint import TRAINED, Contents, check_contents, decode
from peft_fps.checkpoint.expected_contents import expected_module, whole_keys, without_left_out
from peft_fps.checkpoint.record import AdapterRecord
from peft_fps.config import FPSConfig, adapter_config
from peft_fps.layers.entry_layer import EntryLayer
from peft_fps.layers.fps_layer import FPSLayer
from peft_fps.layers.lookup import adapter_state, base_model, target_layers
from peft_fps.lifecycle.injection import adopt_config, prepare_injection
from peft_fps.lifecycle.lora_layers import lora_layers_out
from peft_fps.lifecycle.merge_whole import check_unmerged
from peft_fps.tokens.token_placement import place_token_selection


ADVICE = "Load it under a name of its own with model.load_adapter instead. Nothing was changed."


def hotswap_adapter(
    model: nn.Module, model_name_or_path: str, adapter_name: str, torch_device: str | None = None, **kwargs: Any
) -> None:
    """Replace what an adapter holds by a saved adapter, which may have other entries, and other numbers of them.

    Everything is read and checked before anything changes. Modules that the saved adapter leaves out have no entries
    afterwards, and bias deltas of 0. A saved adapter with a module that the adapter lacks is refused. The adapter gets
    the config of the saved one, and the scale 1. A compiled model gives the new results, and compiles again where the
    number of entries of a layer changes.

    Args:
        model: a model with the adapter, compiled or not.
        model_name_or_path: folder of the saved adapter, or its name on the Hub.
        adapter_name: name of the adapter to replace.
        torch_device: device to which the file is read. Default: PEFT's choice.
        kwargs: `check_base` as in `FPSConfig`, `subfolder`, `revision`, and other options that PEFT passes to the Hub.

    Raises:
        ValueError: there is no such adapter, it is merged or not loaded; or the saved adapter is damaged, was made for
            other base weights, or has other modules or bias deltas. The model is unchanged then.
    """
    # what is written during inference must serve training later
    with torch.inference_mode(False), lora_layers_out(base_model(model)):
        _swap(unwrapped(model), model_name_or_path, adapter_name, torch_device, kwargs)


def _swap(model: nn.Module, path: str, adapter_name: str, device: str | None, options: dict[str, Any]) -> None:
    """Read and check the saved adapter, then write it into the layers."""
    old, layers = adapter_config(model, adapter_name), target_layers(model, adapter_name)
    _check_present(layers, adapter_name)
    config, record = _checked_config(FPSConfig.from_pretrained(path, **options), old, model, adapter_name, layers)
    options = {key: value for key, value in options.items() if key != "check_base"}
    # PEFT reads the file, as in every other way to load
    state_dict = load_peft_weights(path, device=infer_device() if device is None else device, **options)
    contents, present = _checked_contents(model, record, adapter_name, layers, state_dict)
    # all conversions first, since they may fail for want of memory
    tensors = {path: _as_held(layer, adapter_name, contents.modules.get(path, {})) for path, layer in layers.items()}
    wholes = [(present[name], tensor.to(present[name])) for name, tensor in contents.wholes.items()]
    _put(layers, adapter_name, tensors, wholes)
    config.inference_mode = old.inference_mode
    state = adapter_state(layers, adapter_name)
    adopt_config(state, config)
    state.unreached.difference_update(record.allocation)
    state.before = state.evaluation = None
    for module in model.modules():
        configs = module.__dict__.get("peft_config")
        if isinstance(configs, dict) and adapter_name in configs:
            configs[adapter_name] = config
    place_token_selection(model)


def _check_present(layers: Mapping[str, FPSLayer], adapter_name: str) -> None:
    """Raise ValueError if the adapter to replace is merged or not loaded."""
    check_unmerged(layers, adapter_name, "replace")
    for path, layer in layers.items():
        if any(parameter.device.type == "meta" for parameter in layer.adapter_parameters(adapter_name)):
            raise ValueError(
                f"{path}: adapter {adapter_name!r} is on the meta device, expected loaded tensors to replace. Load an "
                "adapter file first. Nothing was changed."
            )


def _checked_config(
    saved: Any, old: FPSConfig, model: nn.Module, adapter_name: str, layers: Mapping[str, FPSLayer]
) -> tuple[FPSConfig, AdapterRecord]:
    """Check the saved adapter's config against model and adapter.

    Args:
        saved: config of the saved adapter, of any method.
        old: config of the adapter to replace.
        model: has that adapter.
        adapter_name: its name.
        layers: its layers, by path.

    Returns:
        The config and its record, in which modules have their present names.
    """
    if not isinstance(saved, FPSConfig) or saved.record is None:
        kind = type(saved).__name__
        raise ValueError(f"The saved adapter has a {kind} without saved entries, expected an FPSConfig. {ADVICE}")
    saved.check_complete()
    if saved.bias != old.bias:
        raise ValueError(
            f"The saved adapter has bias={saved.bias!r}, expected {old.bias!r} as the adapter that it replaces has. "
            f"{ADVICE}"
        )
    if saved.token_gate != old.token_gate:
        raise ValueError(
            f"The saved adapter has token_gate={saved.token_gate!r}, expected {old.token_gate!r} as the adapter "
            f"that it replaces has. {ADVICE}"
        )
    whole, present = set(saved.record.whole_tensors or ()), set(whole_keys(model, adapter_name))
    if whole != present:
        raise ValueError(
            f"The saved adapter trains {sorted(whole) or 'nothing'} whole (modules_to_save), expected "
            f"{sorted(present) or 'nothing'} as the adapter that it replaces does. {ADVICE}"
        )
    base = base_model(model)
    names = current_names(base, saved.record.allocation)
    if unknown := [name for name in names if name not in layers]:
        raise ValueError(
            f"{unknown[0]}: the saved adapter changes this module ({len(unknown)} like it), expected modules of the "
            f"adapter that it replaces alone. {ADVICE}"
        )
    prepare_injection(base, saved)
    return saved, saved.record


def _checked_contents(
    model: nn.Module,
    record: AdapterRecord,
    adapter_name: str,
    layers: Mapping[str, FPSLayer],
    state_dict: Mapping[str, Tensor],
) -> tuple[Contents, dict[str, Tensor]]:
    """Check the tensors of the file.

    Returns:
        The tensors, and those of modules trained whole that they will replace, by name in the base model.
    """
    contents = Contents.of(state_dict.items())
    contents = replace(contents, modules=current_names(base_model(model), contents.modules))
    expected = {
        path: expected_module(layers[path], adapter_name, sizes.entries) for path, sizes in record.allocation.items()
    }
    state = model.state_dict(keep_vars=True)
    present = {name: state[key] for name, key in whole_keys(model, adapter_name).items()}
    check_contents(contents, expected, present)
    return replace(contents, modules=without_left_out(contents.modules, layers, adapter_name)), present


def _as_held(layer: FPSLayer, adapter_name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a module's tensors as its layer will hold them.

    They are on the layer's device. Their dtype loses no digit of the file's, nor is it narrower than before. If
    `tensors` is empty, there are no entries, and bias deltas are 0. An inert bias has a delta if the file has one.
    """
    result = {}
    for name in layer.tensor_names():
        inert = name == "fps_bias" and layer.has_inert_bias(adapter_name)
        will_be_there = name in tensors if inert else adapter_name in getattr(layer, name)
        if not will_be_there:
            continue
        present = getattr(layer, "fps_values" if inert else name)[adapter_name].detach()
        if tensors:
            result[name] = decode(name, tensors[name]).to(present.device)
        else:
            result[name] = present[:0] if name in ("fps_values", "fps_columns") else torch.zeros_like(present)
        if name in TRAINED:
            result[name] = result[name].to(torch.promote_types(present.dtype, result[name].dtype))
    return result


@torch.no_grad()
def _put(
    layers: Mapping[str, FPSLayer],
    adapter_name: str,
    tensors: Mapping[str, Mapping[str, Tensor]],
    wholes: list[tuple[Tensor, Tensor]],
) -> None:
    """Write the new adapter into the layers.

    Args:
        layers: of the adapter, by path.
        adapter_name: name of the adapter.
        tensors: what each layer is to hold, by path and name.
        wholes: tensors of modules that are trained whole, each with what it is to hold.
    """
    for path, layer in layers.items():
        if isinstance(layer, EntryLayer):
            layer.hold_inert_bias(adapter_name, "fps_bias" in tensors[path])
        for name, tensor in tensors[path].items():
            by_adapter = getattr(layer, name)
            old = by_adapter[adapter_name]
            if old.shape == tensor.shape and old.dtype == tensor.dtype and not old.is_inference():
                old.copy_(tensor)  # in the same memory, which compiled graphs may have noted
            elif name in TRAINED:
                old.data = tensor
            else:
                by_adapter[adapter_name] = tensor
        for parameter in layer.adapter_parameters(adapter_name):
            parameter.grad = None
        layer.scaling[adapter_name] = 1.0
    for target, tensor in wholes:
        target.copy_(tensor)
    for layer in layers.values():
        # a compiled forward reads what is derived here and does not look whether it is up to date
        layer.renew(adapter_name)
        names = [name for name in layer.active_adapters if name in layer.fps_state]
        if len(names) > 1 and isinstance(layer, EntryLayer):
            layer.united_structure(names)
