"""What is said of modules and weights that cannot carry a sparse change."""

from typing import Any

from torch import nn

from peft_fps.quantised import SUPPORTED


def remedy(module: nn.Module) -> str:
    """Return what to do about a targeted module of an unsupported kind."""
    if isinstance(module, nn.Embedding):
        return "Train an embedding whole with modules_to_save, or leave it out of target_modules."
    if isinstance(module, nn.MultiheadAttention):
        return (
            "Its projections are one tensor that it reads without calling a layer. Leave it out of target_modules, or "
            "use an implementation with linear layers for query, key and value."
        )
    if hasattr(module, "qweight") or "quant" in type(module).__name__.lower():
        return f"Of quantised weights, those of {SUPPORTED} are supported. Load the base model so, or unquantised."
    stacked = [name for name, parameter in module.named_parameters(recurse=False) if parameter.dim() == 3]
    if stacked:
        return (
            f"Its tensors {', '.join(stacked)} hold the weights of many experts each, which FPS cannot adapt. Leave "
            "it out of target_modules."
        )
    return "Leave it out of target_modules, or train it whole with modules_to_save."


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
