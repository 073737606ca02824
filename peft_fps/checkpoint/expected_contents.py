"""What a model with an adapter expects of the adapter's file."""

from collections.abc import Mapping

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from peft_fps.base.compiled import plain_name
from peft_fps.checkpoint import PEFT_PREFIX, Expected, is_left_out
from peft_fps.layers.fps_layer import FPSLayer


FSDP_PREFIX = "_fsdp_wrapped_module."
"""What FSDP puts before the paths of modules, and leaves out of the keys of a full state dict."""

CHECKPOINTED = "_checkpoint_wrapped_module."
"""What PyTorch's activation checkpointing puts into the paths of modules, and not into the keys of state dicts."""


def state_dict_path(path: str) -> str:
    """Return how the keys of a state dict begin for the module at a path."""
    return path.removeprefix(FSDP_PREFIX).replace(CHECKPOINTED, "")


def expected_module(layer: FPSLayer, adapter_name: str, entries: int) -> Expected:
    """Return what a layer expects of its module's part of the file.

    Args:
        layer: has the adapter.
        adapter_name: name of the adapter.
        entries: number of entries that the file is to hold for this module.
    """
    sizes = layer.sizes(adapter_name)
    gate = layer.threshold(adapter_name) is not None
    bias = adapter_name in layer.fps_bias or layer.has_inert_bias(adapter_name)
    return Expected(sizes.neurons, sizes.inputs, entries, bias, gate)


def without_left_out(
    modules: Mapping[str, Mapping[str, Tensor]], layers: Mapping[str, FPSLayer], adapter_name: str
) -> dict[str, Mapping[str, Tensor]]:
    """Return the tensors of a file without those `fps_bias` that say that there is none.

    Args:
        modules: tensors by module path and name.
        layers: of the adapter, by module path.
        adapter_name: name of the adapter.
    """
    return {
        path: {name: tensor for name, tensor in tensors.items() if name != "fps_bias" or not is_left_out(tensor)}
        if path in layers and layers[path].has_inert_bias(adapter_name)
        else tensors
        for path, tensors in modules.items()
    }


def whole_keys(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """Return the tensors of modules that an adapter trains whole (`modules_to_save`).

    Args:
        model: a `PeftModel` or a base model with adapters.
        adapter_name: name of the adapter.

    Returns:
        Key in the model's state dict, by the tensor's name in the base model, under which a file holds it.
    """
    keys = {}
    for path, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            place = state_dict_path(path)
            for name, stored in module.adapter_state_dict_load_map(adapter_name).items():
                keys[plain_name(f"{place}.{name}").removeprefix(PEFT_PREFIX)] = f"{place}.{stored}"
    return keys
