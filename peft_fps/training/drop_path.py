"""Drop-path (stochastic depth, arXiv 1603.09382): residual branches of transformer blocks left out in training."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


TIMM = ("drop_path1", "drop_path2")
TRANSFORMERS = {
    **dict.fromkeys(("ViTLayer", "DeiTLayer", "ViTMAELayer", "ViTMSNLayer", "IJepaLayer"), "dropout"),
    **dict.fromkeys(("Dinov2Layer", "Dinov2WithRegistersLayer"), "drop_path"),
}
"""By class of a block, the module that it calls on either branch just before it adds the branch."""


def drop_path(branch: Tensor, rate: float) -> Tensor:
    """Return a branch `(batch, ...)` with whole examples at zero, drawn with probability `rate`, the others scaled up.

    Args:
        branch: what a block is about to add to its input.
        rate: at least 0 and below 1. An example that stays is divided by `1 - rate`.
    """
    kept = torch.rand(len(branch), *(1,) * (branch.dim() - 1), device=branch.device) >= rate
    return branch * kept / (1 - rate)


class DropPath:
    """Forward hook that drops examples of a module's output in training.

    Args:
        rate: at least 0 and below 1.
    """

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def __call__(self, module: nn.Module, args: Any, branch: Tensor) -> Tensor:
        """Return the branch, with examples dropped while the module is in training mode."""
        return drop_path(branch, self.rate) if module.training and self.rate else branch


def add_drop_path(model: nn.Module, rate: float) -> list[RemovableHandle]:
    """Let both branches of every block be dropped in training, the rate growing linearly from 0 to `rate`.

    Each branch of each example is drawn alone, from torch's global generator. It comes beside dropout and drop-path
    that the model has already. Parameters, state dict and predictions stay, before and after merging.

        handles = peft_fps.training.add_drop_path(model, 0.1)
        ...  # training
        for handle in handles:
            handle.remove()

    Args:
        model: a ViT of timm, wrapped by transformers or not; or a ViT, DeiT, DINOv2, ViT-MAE, ViT-MSN or I-JEPA of
            transformers. With or without adapters.
        rate: in the last block, at least 0 and below 1. The first block drops nothing.

    Returns:
        Handles of the hooks.

    Raises:
        ValueError: the rate is not in its range, or the model has no such blocks.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"rate is {rate}, expected at least 0 and below 1.")
    blocks = [places for module in model.modules() if (places := _places(module))]
    if not blocks:
        raise ValueError(
            f"A {type(model).__name__} has no blocks that drop-path can be put into, expected a ViT of timm (blocks "
            f"with {' and '.join(TIMM)}) or of transformers ({', '.join(TRANSFORMERS)}). Choose another model, or "
            "leave drop-path out."
        )
    rates = torch.linspace(0, rate, len(blocks)).tolist()
    return [
        place.register_forward_hook(DropPath(share))
        for places, share in zip(blocks, rates, strict=True)
        for place in places
    ]


def _places(module: Any) -> list[nn.Module]:
    """Return the modules of a block that end its branches, nothing if it is no block."""
    if all(hasattr(module, name) for name in TIMM):
        return [getattr(module, name) for name in TIMM]
    kinds = [kind.__name__ for kind in type(module).__mro__]  # token selection derives from a block's class
    name = next((TRANSFORMERS[kind] for kind in kinds if kind in TRANSFORMERS), None)
    found = None if name is None else getattr(module, name, None)
    return [found] if isinstance(found, nn.Module) else []
