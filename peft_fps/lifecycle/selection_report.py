"""The report of what an adapter has selected."""

from typing import Any

from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from peft_fps.card.selection_method import describe
from peft_fps.checkpoint import encoded_bytes, no_entries
from peft_fps.config import adapter_config
from peft_fps.layers.entry_layer import EntryLayer
from peft_fps.layers.lookup import (
    active_adapter,
    adapter_layers,
    adapter_state,
    base_model,
    entry_layers,
    places_of,
    whole_parameters,
)
from peft_fps.lifecycle.change_probe import probe_changes
from peft_fps.selection import LayerSelection, NormSelection, SelectionReport
from peft_fps.targets.base_parameters import count_base_parameters
from peft_fps.targets.left_out import left_out


def selection_report(model: nn.Module, adapter_name: str | None = None, *, probe: Any = None) -> SelectionReport:
    """Return what an adapter has selected, per module and in total.

    Args:
        model: a model with an FPS adapter.
        adapter_name: name of the adapter. Default: the active one.
        probe: data to run the model on, as for `calibrate`. The report then says for each module how large its change
            is beside the base output, and at how many positions it counts. Padding counts too. Default: no run.

    Raises:
        TypeError: the data of the probe is of an unknown kind.
        ValueError: there is no such adapter, no single active one, or no data in the probe.
    """
    adapter_name = adapter_name or active_adapter(model)
    config, layers = adapter_config(model, adapter_name), adapter_layers(model, adapter_name)
    measured = {} if probe is None else probe_changes(model, adapter_name, probe)
    rows: list[LayerSelection] = []
    inert: dict[str, int] = {}
    for path, layer in layers.items():
        biases = layer.neurons if layer.bias_delta(adapter_name) is not None else 0
        if not biases and layer.has_inert_bias(adapter_name):
            inert[path] = layer.neurons
        if isinstance(layer, EntryLayer):
            values, counts, shape = layer.fps_values[adapter_name], layer.fps_row_counts[adapter_name], layer.shape
            size = encoded_bytes(counts, shape.inputs, values.element_size(), biases + inert.get(path, 0))
            if (threshold := layer.threshold(adapter_name)) is not None:
                size += threshold.nbytes
            found = measured.get(path)
            rows.append(
                LayerSelection(
                    *(path, shape.neurons, shape.inputs, values.numel(), biases, size),
                    relative_change=None if found is None else found.magnitude / found.positions,
                    passing=None if found is None else found.passed / found.positions,
                )
            )
        else:
            held = no_entries(layer.fps_bias[adapter_name])
            size = encoded_bytes(held["fps_row_counts"], 0, held["fps_values"].element_size(), biases)
            rows.append(NormSelection(path, layer.neurons, biases=biases, bytes=size))
    head = whole_parameters(model, adapter_name).values()
    state = adapter_state(layers, adapter_name)
    counted, base = state.base_parameters, base_model(model)
    wholes = [
        path
        for path, module in base.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save
    ]
    return SelectionReport(
        layers=tuple(rows),
        base_parameters=count_base_parameters(base) if counted is None else counted,
        head_parameters=sum(parameter.numel() for parameter in head),
        head_bytes=sum(parameter.numel() * parameter.element_size() for parameter in head),
        budget=config.budget,
        method=describe(config, state),
        left_out={weight.name: weight.share for weight in left_out(base, [*places_of(base, adapter_name), *wholes])},
        unreached=() if state.calibration is None else state.calibration.unreached,
        tied={path: tuple(layer.sharing) for path, layer in entry_layers(layers).items() if layer.sharing},
        inert_biases=inert,
        token_keep_rate=state.token_keep_rate,
        token_blocks=state.token_blocks or (),
    )
