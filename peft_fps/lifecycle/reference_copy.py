"""A copy of an adapter as it is, which TRL's trainers keep as the reference of the one that they train on."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from peft_fps.checkpoint.record import AdapterRecord
from peft_fps.config import FPSConfig
from peft_fps.layers.entry_layer import EntryLayer
from peft_fps.layers.lookup import adapter_layers, adapter_state
from peft_fps.targets.whole_checks import whole_tensors


NAME = "ref"
"""How TRL names a reference: `model.add_adapter("ref", model.peft_config["default"])`."""


def reference_of(configs: Mapping[str, Any], adapter_name: str) -> str | None:
    """Return the adapter that a new one is to be a copy of, None if it is to start afresh.

    A new adapter is a copy if it is named `"ref"` and comes with the very config object of another one. TRL copies
    values itself, but only of parameters within modules of the adapter's name, and knows of no selection. One object
    alone does not tell: whoever gives one config to several adapters wants each of them fresh.

    Args:
        configs: of all adapters by name, the new one's included.
        adapter_name: of the new one.
    """
    if adapter_name != NAME:
        return None
    return next((name for name, found in configs.items() if name != NAME and found is configs[NAME]), None)


def config_of_copy(model: nn.Module, config: FPSConfig, adapter_name: str) -> FPSConfig:
    """Return the config of an adapter as if it came from a file, with its present sizes.

    Args:
        model: has the adapter.
        config: the adapter's.
        adapter_name: its name.

    Raises:
        ValueError: the adapter's tensors are damaged, or were never loaded.
    """
    layers = adapter_layers(model, adapter_name)
    for layer in layers.values():
        layer.check_tensors(adapter_name)
    state = adapter_state(layers, adapter_name)
    wholes = [
        path
        for path, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save
    ]
    return replace(
        config,
        record=AdapterRecord(
            allocation={path: layer.sizes(adapter_name) for path, layer in layers.items()},
            calibration=state.calibration,
            whole_tensors=tuple(whole_tensors(model, wholes)),
            selecting_blocks=state.token_blocks,
        ),
        init_weights=True,
    )


@torch.no_grad()
def copy_adapter(model: nn.Module, source: str, target: str) -> None:
    """Give an adapter the entries, changes, scale and modules trained whole of another one.

    Args:
        model: has both, with the same layers and sizes.
        source: name of the one that is read.
        target: name of the one that is written.
    """
    for layer in adapter_layers(model, target).values():
        if isinstance(layer, EntryLayer):
            layer.set_selection(target, layer.fps_columns[source].clone(), layer.fps_row_counts[source].clone())
            layer.hold_inert_bias(target, source in layer.fps_bias)
        else:
            layer.start_from_zero(target)
        for name in layer.adapter_layer_names:
            held = getattr(layer, name)
            if source in held:
                held[target].data = held[source].detach().clone()
        layer.scaling[target] = layer.scaling[source]
        state = layer.fps_state[target]
        state.selected, state.warned = layer.fps_state[source].selected, layer.fps_state[source].warned
        state.before = None
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) and source in module.modules_to_save:
            module.modules_to_save[target].load_state_dict(module.modules_to_save[source].state_dict())
