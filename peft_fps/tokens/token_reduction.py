"""The maths of token selection (TR-PTS, arXiv 2507.22872): tensors in, tensors out.

A patch counts by the attention that the CLS token pays to it. The patches with the most attention stay, and all
others become one token, their mean weighted by attention.
"""

import torch
from torch import Tensor


def cls_attention(query: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """Return the attention that one query pays to every token, averaged over heads.

    It is the query's row of the softmaxed attention, formed alone, so that fused attention can compute the rest.

    Args:
        query: `(batch, heads, head_dim)`, of the CLS token.
        keys: `(batch, heads, tokens, head_dim)`.
        scaling: factor of the products.

    Returns:
        `(batch, tokens)`, rows that sum to 1, in float32 at least, whatever autocast says.
    """
    exact = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        products = keys.to(exact) @ query.to(exact)[..., None]
        return (products[..., 0] * scaling).softmax(-1).mean(1)


def kept_count(patches: int, keep_rate: float) -> int:
    """Return ⌊ρN⌋, the number of patches that stay of N, at least 1.

    Args:
        patches: N.
        keep_rate: ρ, above 0 and at most 1.
    """
    # a product such as 0.29 * 100 is a little below the whole number that it stands for
    return max(1, int(keep_rate * patches + 1e-9))


def fuse_inattentive(x: Tensor, attention: Tensor, protected: int, keep_rate: float) -> Tensor:
    """Keep the patches with the most attention, and fuse the others into one token, `Σ aᵢxᵢ / Σ aᵢ`.

    Among equal attentions the choice is `torch.topk`'s. The gradient flows through the attention too, and not through
    the choice.

    Args:
        x: `(batch, tokens, width)`: first the protected tokens, then the patches.
        attention: `(batch, tokens)`, from `cls_attention`.
        protected: number of tokens at the start that always stay: CLS, distillation and register tokens.
        keep_rate: share of the patches that stay, see `kept_count`.

    Returns:
        `(batch, protected + kept + 1, width)`: protected tokens, kept patches in their order, the fused token. `x`
        itself if every patch stays.
    """
    patches, weights = x[:, protected:], attention[:, protected:]
    count = kept_count(patches.shape[1], keep_rate)
    if count >= patches.shape[1]:
        return x
    kept = weights.topk(count, dim=1).indices.sort(dim=1).values
    rest = weights * torch.ones_like(weights).scatter(1, kept, 0.0)
    rest = rest / rest.sum(1, keepdim=True).clamp_min(torch.finfo(rest.dtype).tiny)
    with torch.autocast(x.device.type, enabled=False):
        fused = rest[:, None] @ patches.to(rest.dtype)
    stay = patches.gather(1, kept[..., None].expand(-1, -1, patches.shape[2]))
    return torch.cat([x[:, :protected], stay, fused.to(x.dtype)], dim=1)
