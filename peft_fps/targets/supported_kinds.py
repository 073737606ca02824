"""Whether a model has layers that are adapted by default at all."""

from collections import Counter

from torch import nn

from peft_fps.base.head import Head
from peft_fps.config import FPSConfig
from peft_fps.layers.layer_types import LAYERS, entry_layer_class
from peft_fps.targets.base_parameters import named_base_modules


def check_kinds(model: nn.Module, head: Head, config: FPSConfig) -> None:
    """Raise ValueError if the default targets are none: no layer is of a kind that has any, or lies in a wanted block.

    Args:
        model: base model, with or without adapters.
        head: of the model.
        config: with the default targets filled in.
    """
    if config.target_modules or config.target_parameters:
        return
    inside = tuple(f"{name}." for name in head.left_out)
    others = {
        name: module
        for name, module in named_base_modules(model)
        if name not in head.left_out
        and not name.startswith(inside)
        and any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))
    }
    fit = [name for name, each in others.items() if entry_layer_class(each) and not isinstance(each, nn.Embedding)]
    if fit and config.layers_to_transform is None:
        return  # another adapter trains them whole
    if fit:
        pattern = "" if config.layers_pattern is None else f" and layers_pattern={config.layers_pattern!r}"
        raise ValueError(
            f"layers_to_transform={config.layers_to_transform!r}{pattern} name no block of {type(model).__name__}, "
            f"expected the numbers of blocks with some of its {len(fit)} layers, the last of which is {fit[-1]}. Look "
            "the blocks up in model.named_modules(). Nothing was changed."
        )
    found = ", ".join(
        f"{kind} x{count}" for kind, count in Counter(type(each).__name__ for each in others.values()).items()
    )
    kinds = ", ".join(kind.__name__ for kind in LAYERS if kind is not nn.Embedding)
    raise ValueError(
        f"{type(model).__name__} has no layer of a kind that FPS adapts by default, found weight matrices in "
        f"{found or 'no module'} outside of its output head, expected {kinds}, MultiheadAttention or packed experts. "
        "Choose a model with layers of these kinds. Embeddings are adapted where target_modules names them, and other "
        "parameters that stack matrices where target_parameters does. Nothing was changed."
    )
