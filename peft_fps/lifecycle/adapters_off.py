"""A model with FPS adapters computes as its base model does."""

from collections.abc import Iterator
from contextlib import contextmanager

from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from peft_fps.layers.fps_layer import FPSLayer


@contextmanager
def adapters_off(model: nn.Module, adapter_name: str, whole: bool = True) -> Iterator[None]:
    """Let the model compute as the base model does within the context. What is trainable stays so.

    Args:
        model: model with the adapter.
        adapter_name: name of the adapter.
        whole: run the adapter's copies of modules that it trains whole, instead of the base model's. Default: True.
    """
    layers = [module for module in model.modules() if isinstance(module, FPSLayer)]
    before = [layer._disable_adapters for layer in layers]
    wrappers = [
        module
        for module in model.modules()
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save
    ]
    active = [wrapper._active_adapter for wrapper in wrappers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        for wrapper in wrappers:
            wrapper._active_adapter = [adapter_name] if whole else []
        yield
    finally:
        for wrapper, names in zip(wrappers, active, strict=True):
            wrapper._active_adapter = names
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled
