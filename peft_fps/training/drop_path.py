"""Drop-path (stochastic depth): residual branches of transformer blocks left out at random in training."""

from typing import Any

import torch
from torch import Tensor, nn


class DropPath(nn.Module):
    """Sets whole examples of a branch to zero with probability `rate` in training, and scales up the others.

    Args:
        rate: from 0 up to, but not, 1.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        """Return the branch, `(batch, ...)`, without the examples that are dropped."""
        if not self.training or self.rate == 0:
            return branch
        kept = torch.rand(len(branch), *(1,) * (branch.dim() - 1), device=branch.device) >= self.rate
        return branch * kept / (1 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"


def add_drop_path(model: nn.Module, rate: float) -> None:
    """Put drop-path on both branches of every block, the rate growing linearly from 0 in the first to `rate`.

    Args:
        model: a ViT of timm, wrapped by transformers or not, or of transformers.
        rate: in the last block.

    Raises:
        ValueError: the model has no blocks of a known kind.
    """
    blocks: list[Any] = [module for module in model.modules() if _is_block(module)]
    if not blocks:
        raise ValueError(
            f"A {type(model).__name__} has no blocks that drop-path can be put into, expected a ViT of timm (blocks "
            "with drop_path1 and drop_path2) or of transformers (ViTLayer). Choose another --model or --drop-path 0."
        )
    for block, share in zip(blocks, torch.linspace(0, rate, len(blocks)).tolist(), strict=True):
        if hasattr(block, "drop_path1"):
            block.drop_path1, block.drop_path2 = DropPath(share), DropPath(share)
        else:  # one module, called on either branch just before it is added
            block.dropout = nn.Sequential(block.dropout, DropPath(share))
        block.train(block.training)  # what is new follows the block


def _is_block(module: Any) -> bool:
    """Return whether a module is a transformer block of timm, or of transformers' ViT."""
    if hasattr(module, "drop_path1") and hasattr(module, "drop_path2"):
        return True
    return type(module).__name__ == "ViTLayer" and isinstance(getattr(module, "dropout", None), nn.Module)
