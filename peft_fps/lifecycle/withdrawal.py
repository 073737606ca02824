"""The withdrawal of an adapter from a model, when its file was refused."""

from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from peft_fps.base.packed_weight import close_modules
from peft_fps.layers.lookup import adapter_state, base_model, fps_layers
from peft_fps.layers.rebuilt_inputs import watch_producers
from peft_fps.layers.tied_uses import follow_tied_uses, unfollow_tied_uses
from peft_fps.lifecycle.lora_layers import lora_layers
from peft_fps.lifecycle.model_hooks import release_hooks
from peft_fps.tokens.token_placement import place_token_selection


def withdraw_adapter(model: nn.Module, adapter_name: str) -> None:
    """Make a model what it was before PEFT added an adapter to it in order to load a file.

    An adapter that was loaded or selected before stays, and so do all other adapters.

    Args:
        model: a `PeftModel` or a base model with adapters.
        adapter_name: name of the adapter.
    """
    layers = {name: layer for name, layer in fps_layers(model).items() if adapter_name in layer.fps_state}
    if not any(layer.awaits_loading(adapter_name) for layer in layers.values()):
        return
    before = adapter_state(layers, adapter_name).before
    if before is not None:
        before.restore()  # first, so that what is taken out is active nowhere
    for name, layer in layers.items():
        if set(layer.fps_state) == {adapter_name}:
            _replace(model, name, layer.base_layer)
        else:
            layer.delete_adapter(adapter_name)
    for name, module in list(model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            if set(module.modules_to_save) == {adapter_name}:
                _replace(model, name, module.original_module)
            else:
                del module.modules_to_save[adapter_name]
                module._adapters.discard(adapter_name)
    close_modules(model)
    place_token_selection(model)
    left = fps_layers(model)
    unfollow_tied_uses(model)
    follow_tied_uses(model)  # of the embeddings that other adapters change
    paths = {*(layer.module_path for layer in left.values()), *lora_layers(base_model(model))}
    for module in model.modules():
        if isinstance(module, BaseTuner):
            module.targeted_module_names = [name for name in module.targeted_module_names if name in paths]
        configs = module.__dict__.get("peft_config")
        if isinstance(configs, dict):  # one dict that tuner and base model share
            configs.pop(adapter_name, None)
            if not configs:
                del module.peft_config
    if left:
        watch_producers(model)  # norms that were wrapped noted their outputs themselves
    else:
        release_hooks(model)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put another module in the place of the one at path `name`."""
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)
