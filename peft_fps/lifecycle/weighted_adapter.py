"""A new adapter from those that a model has: all of it is computed before the model gets it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from peft_fps.base.sharded import check_whole
from peft_fps.checkpoint.record import AdapterRecord
from peft_fps.config import FPSConfig
from peft_fps.layers.entry_layer import EntryLayer
from peft_fps.layers.fps_layer import FPSLayer
from peft_fps.layers.lookup import entry_layers, fps_layers
from peft_fps.lifecycle.combination import Combination, combine, united_entries
from peft_fps.lifecycle.entry_allocation import bias_count
from peft_fps.selection.budget_allocation import round_up
from peft_fps.targets.base_parameters import count_base_parameters
from peft_fps.targets.inert_biases import inert_biases
from peft_fps.targets.target_checks import check_adapter_name
from peft_fps.targets.whole_checks import whole_tensors


@dataclass(frozen=True)
class _Entries:
    """The new adapter's entries in one layer, in the form of `EntryLayer`: columns, row counts and values."""

    columns: Tensor
    row_counts: Tensor
    values: Tensor


@dataclass(frozen=True)
class _Combined:
    """What the new adapter has in one layer: entries, unless it is a norm, and a bias delta `(neurons,)`, if any."""

    entries: _Entries | None
    bias: Tensor | None

    @property
    def count(self) -> int:
        """Number of entries."""
        return 0 if self.entries is None else self.entries.values.numel()


def add_weighted_adapter(tuner: Any, how: Combination, adapter_name: str, whole_from: str | None) -> None:
    """Add the combination to the model of an `FPSModel`; see `FPSModel.add_weighted_adapter`.

    Args:
        tuner: the `FPSModel`. Its model gets the new adapter.
        how: adapters, weights and rule.
        adapter_name: name of the new adapter.
        whole_from: name of the adapter that gives its modules that are trained whole. None if at most one of the
            adapters trains each module.

    Raises:
        TypeError, ValueError: the adapters cannot be combined. The model is unchanged then.
    """
    model: nn.Module = tuner.model
    check_whole(model, "combine adapters", "Combine them before the model is sharded, or on a whole base model.")
    layers = _checked_layers(tuner, how, adapter_name)
    token_blocks = _token_blocks(tuner, how, layers)
    wholes = _whole_modules(model, how.adapters, whole_from)
    combined = {path: _combine_layer(layer, how) for path, layer in layers.items()}
    configs = [tuner.peft_config[name] for name in how.adapters]
    givers = list(dict.fromkeys(wholes.values()))
    names = dict.fromkeys(name for giver in givers for name in tuner.peft_config[giver].modules_to_save or [])
    given = whole_tensors(model, [path for path, module in model.named_modules() if module in wholes])
    record = AdapterRecord(
        allocation={
            path: replace(layers[path].sizes(_carried(layers[path], how)[0]), entries=tensors.count)
            for path, tensors in combined.items()
        },
        calibration=how.record(),
        whole_tensors=tuple(given),
        selecting_blocks=token_blocks,
    )
    config = _combined_config(model, configs, layers, combined, record, list(names))
    tuner.peft_config[adapter_name] = config
    tuner.inject_adapter(model, adapter_name)
    for path, tensors in combined.items():
        _fill(layers[path], adapter_name, tensors)
    for wrapper, giver in wholes.items():
        wrapper.modules_to_save[adapter_name].load_state_dict(wrapper.modules_to_save[giver].state_dict())


def _checked_layers(tuner: Any, how: Combination, adapter_name: Any) -> dict[str, FPSLayer]:
    """Return the layers of the adapters by module path, when all of it can be combined."""
    found = tuner.peft_config
    if not isinstance(adapter_name, str) or not adapter_name:
        raise TypeError(f"adapter_name is {adapter_name!r}, expected a name for the new adapter.")
    if adapter_name in found:
        raise ValueError(
            f"There is an adapter named {adapter_name!r} already, expected a new name. Choose another one, or call "
            f"model.delete_adapter({adapter_name!r}) first."
        )
    check_adapter_name(tuner.model, adapter_name)
    if unknown := [name for name in how.adapters if name not in found]:
        raise ValueError(f"Cannot combine the adapters {unknown}, expected names among {sorted(found)}.")
    layers = {layer.module_path: layer for layer in fps_layers(tuner.model).values()}
    for path, layer in layers.items():
        if layer.merged:
            raise ValueError(
                f"{path}: found merged adapters {layer.merged_adapters}, expected none while adapters are combined. "
                "Call model.unmerge_adapter() first. Nothing was changed."
            )
        for name in _carried(layer, how):
            layer.check_tensors(name)
            if layer.threshold(name) is not None:
                raise ValueError(
                    f"{path}: adapter {name!r} has a gate (token_gate), expected adapters without: a sum of changes "
                    "cannot say where each of them counts. Nothing was changed."
                )
    return {path: layer for path, layer in layers.items() if _carried(layer, how)}


def _token_blocks(tuner: Any, how: Combination, layers: Mapping[str, FPSLayer]) -> tuple[int, ...] | None:
    """Return the blocks in which the adapters select tokens, None without any. Raise ValueError if they differ."""
    settings = {}
    for name in how.adapters:
        states = [layer.fps_state[name] for layer in layers.values() if name in layer.fps_state]
        blocks = states[0].token_blocks if states else None
        settings[name] = (tuner.peft_config[name].token_keep_rate, blocks)
    if len(set(settings.values())) > 1:
        raise ValueError(
            f"The adapters differ in token_keep_rate and token_blocks ({settings}), expected the same, since one "
            "adapter selects tokens in one way. Nothing was changed."
        )
    return next(iter(settings.values()))[1]


def _carried(layer: FPSLayer, how: Combination) -> list[str]:
    """Return those of the combined adapters that hold something in a layer, each once."""
    return [name for name in dict.fromkeys(how.adapters) if layer.carries(name)]


def _whole_modules(model: nn.Module, adapters: Sequence[str], chosen: str | None) -> dict[ModulesToSaveWrapper, str]:
    """Return whose copy of each module that is trained whole the new adapter gets."""
    if chosen is not None and chosen not in adapters:
        raise ValueError(f"modules_to_save_from is {chosen!r}, expected one of the adapters {list(adapters)}.")
    wholes = {}
    for path, module in model.named_modules():
        if not isinstance(module, ModulesToSaveWrapper):
            continue
        owners = [name for name in dict.fromkeys(adapters) if name in module.modules_to_save]
        owners = owners if chosen is None else [name for name in owners if name == chosen]
        if len(owners) > 1:
            raise ValueError(
                f"{path}: the adapters {owners} train this module whole (modules_to_save), expected at most one that "
                "does, since whole modules are not combined. Say whose copy the new adapter gets with "
                f"modules_to_save_from={owners[0]!r}, say. Nothing was changed."
            )
        if owners:
            wholes[module] = owners[0]
    return wholes


@torch.no_grad()
def _combine_layer(layer: FPSLayer, how: Combination) -> _Combined:
    """Return what the combination of the adapters has in one layer."""
    entries = _combine_entries(layer, how) if isinstance(layer, EntryLayer) else None
    return _Combined(entries, _combine_biases(layer, how))


def _combine_entries(layer: EntryLayer, how: Combination) -> _Entries:
    """Return the combined entries of a layer: the union of those of the adapters that it carries."""
    own = _of_those(how, [layer.carries(name) for name in how.adapters])
    columns, row_counts, places = united_entries([layer.structure(name) for name in own.adapters])
    values = [layer.scaled(layer.fps_values[name], name) for name in own.adapters]
    return _Entries(columns, row_counts, _checked(combine(values, places, columns.numel(), own), layer))


def _combine_biases(layer: FPSLayer, how: Combination) -> Tensor | None:
    """Return the combined bias delta of a layer, `(neurons,)`; None if no adapter has one here."""
    present = [layer.carries(name) and name in layer.fps_bias for name in how.adapters]
    if not any(present):
        return None
    own = _of_those(how, present)
    deltas = [layer.scaled(layer.fps_bias[name], name) for name in own.adapters]
    everywhere = torch.arange(layer.neurons, device=deltas[0].device)
    return _checked(combine(deltas, [everywhere] * len(deltas), layer.neurons, own), layer)


def _of_those(how: Combination, present: Sequence[bool]) -> Combination:
    """Return the combination of some of the adapters alone."""
    kept = [i for i, here in enumerate(present) if here]
    return replace(how, adapters=[how.adapters[i] for i in kept], weights=[how.weights[i] for i in kept])


def _checked(tensor: Tensor, layer: FPSLayer) -> Tensor:
    """Return the tensor, which is to be finite. Raise ValueError with the path of the layer if it is not."""
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(
            f"{layer.module_path}: the combined changes hold NaN or infinity, expected finite numbers. Use smaller "
            "weights. Nothing was changed."
        )
    return tensor


def _combined_config(
    model: nn.Module,
    configs: Sequence[FPSConfig],
    layers: Mapping[str, FPSLayer],
    combined: Mapping[str, _Combined],
    record: AdapterRecord,
    modules_to_save: list[str],
) -> FPSConfig:
    """Return a config as if the new adapter came from a file: with its sizes, and what it trains as its budget."""
    order = {"none": 0, "all": 1, "with_norms": 2}
    bias = max((config.bias for config in configs), key=lambda kind: order[kind])
    entries = sum(sizes.entries for sizes in record.allocation.values())
    inert = inert_biases(model, [path for path, tensors in combined.items() if tensors.bias is None])
    biases = sum(bias_count(layer.base_layer) for path, layer in layers.items() if path not in inert)
    trained = entries + (0 if bias == "none" else biases)
    return replace(
        configs[0],
        budget=min(round_up(trained, count_base_parameters(model)), 1.0) if entries else 0.0,
        per_neuron=None,
        budget_pattern={},
        bias=bias,
        target_modules=set(entry_layers(layers)),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        modules_to_save=modules_to_save,
        record=record,
        init_weights=True,
    )


def _fill(layer: FPSLayer, adapter_name: str, tensors: _Combined) -> None:
    """Write the combination into a layer that has just got the new adapter."""
    if isinstance(layer, EntryLayer):
        assert tensors.entries is not None
        layer.set_selection(adapter_name, tensors.entries.columns, tensors.entries.row_counts)
        layer.fps_values[adapter_name].data = tensors.entries.values
        layer.hold_inert_bias(adapter_name, tensors.bias is not None)
    else:
        layer.start_from_zero(adapter_name)
    if tensors.bias is not None:  # else it stays zero, if the new adapter has one here
        layer.fps_bias[adapter_name].data = tensors.bias
    layer.fps_state[adapter_name].before = None
