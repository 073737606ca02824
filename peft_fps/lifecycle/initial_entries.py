"""The entries that a new adapter has before any data was seen."""

import torch
from torch import nn

from peft_fps.config import FPSConfig
from peft_fps.importance.random import random_scorer
from peft_fps.importance.scorer import scorer
from peft_fps.layers.lookup import adapter_layers, adapter_state, entry_layers
from peft_fps.lifecycle.entry_replacement import rank, set_entries
from peft_fps.lifecycle.token_choice import chosen_token_blocks


def select_without_data(model: nn.Module, config: FPSConfig, adapter_name: str) -> None:
    """Give a new adapter its first entries and zero changes.

    The importance of its config chooses them. An importance that needs data leaves it to the weight magnitude until
    `calibrate` is called. `init_weights=False` draws random entries, and random changes that are not zero, from
    torch's global generator. An adapter on the meta device stays as it is, since its tensors are to be loaded.

    Args:
        model: has the adapter.
        config: of the adapter.
        adapter_name: its name.
    """
    layers = adapter_layers(model, adapter_name)
    weighted = entry_layers(layers)
    parameters = (parameter for layer in layers.values() for parameter in layer.adapter_parameters(adapter_name))
    if any(parameter.device.type == "meta" for parameter in parameters):
        return
    seed = None if config.init_weights else int(torch.randint(2**62, (), device="cpu"))
    scores = {
        path: scorer(layer, path, config, {}) if seed is None else random_scorer(layer, path, seed)
        for path, layer in weighted.items()
    }
    entries = {path: layer.fps_values[adapter_name].numel() for path, layer in weighted.items()}
    set_entries(layers, adapter_name, rank(weighted, config, entries, scores), layers)
    if config.token_keep_rate is not None:
        state = adapter_state(layers, adapter_name)
        state.token_blocks = chosen_token_blocks(model, config, weighted, scores)
    if not config.init_weights:
        for layer in layers.values():
            for parameter in layer.adapter_parameters(adapter_name):
                # bounded away from zero, so that no change can vanish
                noise = torch.rand(parameter.shape, dtype=torch.float32, device="cpu") + 0.5
                sign = torch.randint(2, parameter.shape, device="cpu") * 2 - 1
                parameter.data.copy_(noise * sign)
