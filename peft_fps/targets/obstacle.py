"""Obstacles that keep a module or a weight from carrying a sparse change, and the advice for each."""

from typing import Any

from torch import nn

from peft_fps.base.attention import has_projections
from peft_fps.base.quantisation import SUPPORTED, quantisation
from peft_fps.base.substitution import follows_its_weight, overrides_forward


def remedy(module: nn.Module) -> str:
    """Return what to do about a targeted module of an unsupported kind."""
    if isinstance(module, nn.Embedding):
        return "Train an embedding whole with modules_to_save, or leave it out of target_modules."
    if has_projections(module):
        return "Name its projections, in_proj and out_proj, in target_modules instead."
    if isinstance(module, nn.MultiheadAttention):
        return (
            "It reads its projections without calling a layer, in a forward of its own or from a tensor each. Leave "
            "it out of target_modules, or use an implementation with linear layers for query, key and value."
        )
    if hasattr(module, "qweight") or "quant" in type(module).__name__.lower():
        return f"Of quantised weights, those of {SUPPORTED} are supported. Load the base model so, or unquantised."
    stacked = [name for name, parameter in module.named_parameters(recurse=False) if parameter.dim() == 3]
    if stacked:
        return (
            f"Its parameters {', '.join(stacked)} hold the weights of many experts each. Name them in "
            f"target_parameters={stacked} instead."
        )
    return "Leave it out of target_modules, or train it whole with modules_to_save."


def obstacle(module: Any, own: str = "weight", *, certain: bool = False) -> str | None:
    """Return what keeps a layer of a supported kind from a sparse change, for a message. None if nothing does.

    Args:
        module: the layer.
        own: name of the parameter that the change is added to.
        certain: a forward of the layer's own that cannot be tried counts as an obstacle.
    """
    if quantisation(module) is not None:
        return None
    if own not in module._parameters:
        return (
            f"its {own} is computed from other tensors (a parametrization), expected a parameter that a merge can "
            "write to"
        )
    if not overrides_forward(module):
        return None
    if is_offloaded(module):
        return "it has a forward of its own and is offloaded by accelerate, expected its weight at hand"
    if module.weight.device.type == "meta":
        return None
    follows = follows_its_weight(module)
    if follows is None and certain:
        return f"the forward of {type(module).__name__} fails on an input alone, so that it cannot be tried"
    if follows is False:
        return (
            f"the forward of {type(module).__name__} does not follow its {own} (it may keep a copy made before), "
            "expected one that computes with the changed weight"
        )
    return None


def is_offloaded(module: Any) -> bool:
    """Return whether accelerate offloads a module's own parameters."""
    return bool(getattr(getattr(module, "_hf_hook", None), "offload", False))


def check_weight(name: str, module: Any, dimensions: int) -> None:
    """Raise ValueError unless a layer's weight is whole, floating and not empty.

    Args:
        name: module path of the layer.
        module: the layer, whose weight is not quantised in a supported way.
        dimensions: the least that the weight must have.
    """
    weight = module.weight
    if hasattr(weight, "ds_id"):
        raise ValueError(
            f"{name}.weight is partitioned by DeepSpeed's ZeRO stage 3 (shape {tuple(weight.shape)}, whole "
            f"{tuple(getattr(weight, 'ds_shape', ()))}), expected a whole weight to select entries of. Use "
            "stage 1 or 2, which leave parameters whole."
        )
    if not weight.is_floating_point() or weight.numel() == 0 or weight.dim() < dimensions:
        raise ValueError(
            f"{name} ({type(module).__name__}) has a weight of dtype {weight.dtype} and shape {tuple(weight.shape)}, "
            f"expected a floating weight, dense or quantised by {SUPPORTED}. Load the base model unquantised, or "
            "quantised by one of these."
        )
