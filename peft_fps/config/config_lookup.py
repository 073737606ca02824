"""Lookup of an adapter's config in a model, which PEFT, `torch.compile` or a trainer may have wrapped."""

from torch import nn

from peft_fps.config.fps_config import FPSConfig
from peft_fps.layers.lookup import fps_layers


def adapter_config(model: nn.Module, adapter_name: str) -> FPSConfig:
    """Return the config of an FPS adapter.

    Args:
        model: has the adapter. Any of its wrappers may hold the config.
        adapter_name: name of the adapter.

    Raises:
        ValueError: there is no such adapter.
    """
    for module in model.modules():
        configs = module.__dict__.get("peft_config")
        if isinstance(configs, dict) and isinstance(configs.get(adapter_name), FPSConfig):
            return configs[adapter_name]
    names = sorted({name for layer in fps_layers(model).values() for name in layer.fps_state})
    raise ValueError(
        f"Found no FPS adapter named {adapter_name!r}, expected one of {names}. Add it with get_peft_model or "
        "add_adapter first."
    )
