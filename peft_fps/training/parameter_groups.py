"""Parameter groups of an optimizer: learning rates for biases, norms and the head, beside that of selected entries."""

import math
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from peft_fps.layers.lookup import fps_layers
from peft_fps.layers.norm import Norm


DECAYED = {"entries", "whole", "others"}
NAMES = (
    *("entries", "biases", "norms", "thresholds"),
    *("whole", "whole, not decayed", "others", "others, not decayed"),
)
"""The groups in their order."""

HEAD = ("whole", "whole, not decayed")
"""Groups of modules that are trained whole."""

HELD = {"fps_values": "entries", "fps_bias": "biases", "fps_threshold": "thresholds"}
"""Groups of what FPS layers hold, by attribute."""


def parameter_groups(
    model: nn.Module,
    lr: float,
    *,
    bias_lr: float | None = None,
    norm_lr: float | None = None,
    head_lr: float | None = None,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Return all trainable parameters of a model in groups for an optimizer, each parameter once.

        optimizer = torch.optim.AdamW(peft_fps.parameter_groups(model, 1e-2, bias_lr=3e-3))
        Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))

    Each group is a dict with `name`, `params`, `lr` and `weight_decay`. A group without parameters is left out. The
    names are, in this order:

    - `"entries"`: changes of selected weights. Weight decay draws them to zero, so the model to its base.
    - `"biases"`: bias deltas of adapted layers.
    - `"norms"`: bias deltas of norms, and weights and biases of norms that are trained in another way.
    - `"thresholds"`: of token gates.
    - `"whole"`: modules that are trained whole, such as the head. Weight decay draws them to zero.
    - `"whole, not decayed"`: their biases.
    - `"others"`, `"others, not decayed"`: whatever else is trainable, the latter with less than two dimensions.

    Only active adapters are trainable, so call it again after `set_adapter`. Calibration before or after it makes no
    difference: the parameters stay the same objects.

    Args:
        model: a model with one or several FPS adapters, or any other.
        lr: learning rate of whatever has none of its own.
        bias_lr: of `"biases"`. Default: `lr`.
        norm_lr: of `"norms"`. Default: `bias_lr`.
        head_lr: of `"whole"` and `"whole, not decayed"`. Default: `lr`.
        weight_decay: of `"entries"`, `"whole"` and `"others"`. The other groups have none.

    Raises:
        ValueError: a rate is not a positive number, the weight decay is negative or not finite, or the model has no
            trainable parameter.
    """
    bias_lr = lr if bias_lr is None else bias_lr
    norm_lr = bias_lr if norm_lr is None else norm_lr
    head_lr = lr if head_lr is None else head_lr
    for name, rate in {"lr": lr, "bias_lr": bias_lr, "norm_lr": norm_lr, "head_lr": head_lr}.items():
        if not (math.isfinite(rate) and rate > 0):
            raise ValueError(f"{name} is {rate}, expected a finite number above 0.")
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise ValueError(f"weight_decay is {weight_decay}, expected a finite number of at least 0.")
    kinds, rates = _kinds(model), {"biases": bias_lr, "norms": norm_lr} | dict.fromkeys(HEAD, head_lr)
    found: dict[str, list[nn.Parameter]] = {name: [] for name in NAMES}
    for parameter in model.parameters():
        if parameter.requires_grad:
            found[_group(kinds.get(id(parameter), "others"), parameter)].append(parameter)
    if not any(found.values()):
        raise ValueError(f"The {type(model).__name__} has no trainable parameter, expected an adapter to train.")
    return [
        {
            "name": name,
            "params": parameters,
            "lr": rates.get(name, lr),
            "weight_decay": weight_decay if name in DECAYED else 0.0,
        }
        for name, parameters in found.items()
        if parameters
    ]


def _kinds(model: nn.Module) -> dict[int, str]:
    """Return the kind of each parameter that FPS layers, modules trained whole or norms hold, by its id."""
    kinds: dict[int, str] = {}
    for module in model.modules():
        if "norm" in type(module).__name__.lower():  # each model library has norms of its own
            kinds |= {id(parameter): "norms" for parameter in module.parameters(recurse=False)}
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            kinds |= {id(parameter): "whole" for parameter in module.parameters()}
    for layer in fps_layers(model).values():
        for attribute, kind in HELD.items():
            held = getattr(layer, attribute, None) or {}
            kind = "norms" if isinstance(layer, Norm) else kind
            kinds |= {id(parameter): kind for parameter in held.values()}
    return kinds


def _group(kind: str, parameter: nn.Parameter) -> str:
    """Return the name of a parameter's group: of whole modules and others, biases and the like are apart."""
    dimensions = len(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 leaves an empty tensor
    return f"{kind}, not decayed" if kind in ("whole", "others") and dimensions < 2 else kind
