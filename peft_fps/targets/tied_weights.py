"""Modules that share the weight of a targeted embedding: which of them can compute with its changes."""

from collections.abc import Sequence
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from peft_fps.base.substitution import overrides_forward
from peft_fps.layers.tied_uses import is_tied_use
from peft_fps.targets.base_parameters import named_base_modules
from peft_fps.targets.obstacle import is_offloaded, obstacle


def tie_obstacle(base: Any, module: Any, own: str) -> str | None:
    """Return why a module cannot follow the changes of a weight that it shares, for a message. None if it can.

    Args:
        base: targeted base layer that has the weight.
        module: the other module.
        own: name of its parameter that is this weight.
    """
    if not isinstance(base, nn.Embedding):
        return "expected a weight of its own"
    if own != "weight" or not isinstance(module, (nn.Linear, nn.Embedding)):
        return f"which is part of a {type(module).__name__}, expected one of a linear layer or an embedding"
    if is_offloaded(base) or is_offloaded(module):
        return "which accelerate offloads, expected tied weights at hand"
    if isinstance(module, nn.Linear) and overrides_forward(module):
        return f"and {type(module).__name__} has a forward of its own, expected that of torch.nn.Linear"
    return None if (found := obstacle(module)) is None else f"but {found}"


def check_tied_uses(model: nn.Module, targets: Sequence[str], wholes: Sequence[str]) -> None:
    """Raise ValueError if a module that shares the weight of an adapted embedding cannot follow its changes.

    That is so if it is, or is to be, trained whole, or if accelerate offloads the weight.

    Args:
        model: base model, with or without other adapters.
        targets: paths of the modules that will have entries.
        wholes: paths of the modules that the adapter trains whole.
    """
    inside = tuple(f"{path}." for path in wholes)
    wrapped = tuple(f"{path}." for path, part in model.named_modules() if isinstance(part, AuxiliaryTrainingWrapper))
    modules: dict[str, Any] = dict(named_base_modules(model))
    for target in targets:
        _check_tie_at_hand(model, target, modules.get(target))
    tied = {id(modules[name].weight): name for name in targets if isinstance(modules.get(name), nn.Embedding)}
    for path, module in modules.items():
        name = tied.get(id(module._parameters.get("weight")))
        whole = f"{path}.".startswith(inside) and (is_tied_use(module) or name is not None)
        if whole or (name is not None and path.startswith(wrapped)):
            raise ValueError(
                f"{path} shares the weight of the embedding {name or 'that another adapter changes'} (tied weights), "
                "and is trained whole (modules_to_save), expected one of the two: the copy that is trained would not "
                "follow the embedding. Leave one of them out."
            )


def _check_tie_at_hand(model: Any, name: str, module: Any) -> None:
    """Raise ValueError if accelerate offloads an embedding whose weight transformers has tied.

    What takes the place of an offloaded weight differs from module to module, and does not show who shares it.
    """
    keys = getattr(model, "all_tied_weights_keys", None) or {}
    away = isinstance(module, nn.Embedding) and hasattr(module, "_hf_hook") and module.weight.device.type == "meta"
    if away and f"{name}.weight" in {*keys, *keys.values()}:
        others = sorted({*keys, *keys.values()} - {f"{name}.weight"})
        raise ValueError(
            f"{name}.weight is tied ({', '.join(others)}) and accelerate offloads it, expected tied weights at hand. "
            "Keep the embedding and all that share its weight on a device with device_map, or leave it out with "
            "exclude_modules."
        )
