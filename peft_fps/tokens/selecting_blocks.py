"""Transformer blocks that select tokens between attention and MLP, for the blocks of transformers and timm.

Such a block adds both residuals in its forward, so no hook can cut between them. A class derived from the block's own
takes its place (`module.__class__`), with a short forward: hooks, checkpointing, recorded outputs and isinstance work
as before. Where every patch stays, the block's own forward runs.
"""

import sys
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peft_fps.tokens.token_reduction import cls_attention, fuse_inattentive
from peft_fps.tokens.token_switch import TokenSwitch


class Switched(nn.Module):
    """A module whose class was replaced by one that is derived from it.

    Attributes:
        plain_class: the class that it had.
        kind: what was put over it, a class of this module.
        token_switch: which share of the patches stays at the moment. An attention has none.
    """

    plain_class: type[nn.Module]
    kind: "type[Switched]"
    token_switch: TokenSwitch

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the class was made at run time, so copies and pickles name the two that it was made from
        return _revived, (self.plain_class, self.kind), dict(self.__dict__)


class SelectingBlock(Switched):
    """A block that selects tokens. Its attention is a `ScoringAttention` or a `TimmScoringAttention`."""

    attention_name = "attention"

    def reduced(self, x: Tensor, attention: Tensor) -> Tensor:
        """Return the tokens `(batch, tokens, width)` that stay, by the attention `(batch, tokens)` of CLS."""
        return fuse_inattentive(x, attention, self.token_switch.protected, self.token_switch.keep_rate())

    def selects(self, *masks: Any) -> bool:
        """Return whether the block selects tokens in this call.

        Args:
            masks: what the call says of masked attention: tensors, None or False.

        Raises:
            ValueError: it selects tokens, and there is a mask.
        """
        if self.token_switch.keep_rate() >= 1:
            return False
        if any(mask is not None and mask is not False for mask in masks):
            raise ValueError(
                f"{self.token_switch.path}: found an attention mask while tokens are selected (token_keep_rate), "
                "expected attention over all tokens. Leave the mask out, or call model.set_token_keep_rate(1.0)."
            )
        return True


class ViTSelectingBlock(SelectingBlock):
    """`ViTLayer` and `DeiTLayer` of transformers."""

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        """Run attention, select tokens, and run the MLP on those: `(batch, tokens, width)` to fewer tokens."""
        if not self.selects(attention_mask):
            return super().forward(hidden_states, attention_mask, **kwargs)
        block: Any = self
        attended, _, scores = block.attention(block.layernorm_before(hidden_states), with_cls_scores=True, **kwargs)
        hidden_states = self.reduced(block.dropout(attended) + hidden_states, scores)
        return block.dropout(block.mlp(block.layernorm_after(hidden_states))) + hidden_states


class Dinov2SelectingBlock(SelectingBlock):
    """`Dinov2Layer` and `Dinov2WithRegistersLayer` of transformers."""

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        """Run attention, select tokens, and run the MLP on those: `(batch, tokens, width)` to fewer tokens."""
        if not self.selects(attention_mask):
            return super().forward(hidden_states, attention_mask, **kwargs)
        block: Any = self
        attended, _, scores = block.attention(block.norm1(hidden_states), with_cls_scores=True, **kwargs)
        hidden_states = self.reduced(block.drop_path(block.layer_scale1(attended)) + hidden_states, scores)
        return block.drop_path(block.layer_scale2(block.mlp(block.norm2(hidden_states)))) + hidden_states


class TimmSelectingBlock(SelectingBlock):
    """`Block` of timm's `VisionTransformer`."""

    attention_name = "attn"

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run attention, select tokens, and run the MLP on those: `(batch, tokens, width)` to fewer tokens."""
        if not self.selects(*args, *kwargs.values()):
            return super().forward(x, *args, **kwargs)
        block: Any = self
        attended, scores = block.attn(block.norm1(x), with_cls_scores=True)
        x = self.reduced(x + block.drop_path1(block.ls1(attended)), scores)
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


class ScoringAttention(Switched):
    """Attention of transformers' ViT, DeiT and DINOv2 that can say how much CLS attends to every token."""

    eager_attention: Any

    def forward(
        self, hidden_states: Tensor, attention_mask: Any = None, *, with_cls_scores: bool = False, **kwargs: Any
    ) -> Any:
        """Return what the attention returns, with the attention of CLS `(batch, tokens)` behind it if asked for."""
        if not with_cls_scores:
            return super().forward(hidden_states, attention_mask, **kwargs)
        attention: Any = self
        shape = hidden_states.shape[:-1]
        query, key, value = (
            project(hidden_states).view(*shape, -1, attention.head_dim).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            attention.config._attn_implementation, type(self).eager_attention
        )
        dropout = attention.attention_dropout if self.training else 0.0
        attended, weights = attend(self, query, key, value, None, dropout=dropout, scaling=attention.scaling, **kwargs)
        attended = attention.o_proj(attended.reshape(*shape, -1).contiguous())
        return attended, weights, cls_attention(query[:, :, 0], key, attention.scaling)


class TimmScoringAttention(Switched):
    """`Attention` of timm that can say how much CLS attends to every token."""

    def forward(self, x: Tensor, *args: Any, with_cls_scores: bool = False, **kwargs: Any) -> Any:
        """Return what the attention returns, with the attention of CLS `(batch, tokens)` behind it if asked for."""
        if not with_cls_scores:
            return super().forward(x, *args, **kwargs)
        attention: Any = self
        shape = x.shape[:-1]
        joint = attention.qkv(x).reshape(*shape, 3, attention.num_heads, attention.head_dim)
        query, key, value = joint.permute(2, 0, 3, 1, 4).unbind(0)
        query, key = attention.q_norm(query), attention.k_norm(key)
        if attention.fused_attn:
            dropout = attention.attn_drop.p if self.training else 0.0
            attended = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        else:
            weights = (query * attention.scale @ key.transpose(-2, -1)).softmax(dim=-1)
            attended = attention.attn_drop(weights) @ value
        attended = attended.transpose(1, 2).reshape(*shape, -1)
        if hasattr(attention, "norm"):  # of newer versions, as is the gate
            attended = attention.norm(attended)
        if getattr(attention, "gate", None) is not None:
            attended = attended * attention.gate(x).sigmoid()
        attended = attention.proj_drop(attention.proj(attended))
        return attended, cls_attention(query[:, :, 0], key, attention.scale)


DERIVED: dict[tuple[type, type], Any] = {}
"""Classes that were made so far, by the two that they were made from."""


def derived_class(plain: type[nn.Module], kind: type[Switched]) -> Any:
    """Return the class that takes the place of `plain`, with the forward of `kind`. It has the name of `plain`."""
    if (plain, kind) not in DERIVED:
        DERIVED[plain, kind] = _derived(plain, kind)
    return DERIVED[plain, kind]


def _derived(plain: type[nn.Module], kind: type[Switched]) -> Any:
    """Make the class that `derived_class` returns."""
    members: dict[str, Any] = {"__module__": plain.__module__, "plain_class": plain, "kind": kind}
    if issubclass(kind, ScoringAttention):
        members["eager_attention"] = staticmethod(sys.modules[plain.__module__].__dict__["eager_attention_forward"])
    return type(plain.__name__, (kind, plain), members)


def plain_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that a module has, or had before it was replaced."""
    return module.plain_class if isinstance(module, Switched) else type(module)


def switch_class(module: nn.Module, kind: type[Switched] | None, switch: TokenSwitch | None) -> None:
    """Give a module a class that selects tokens, or its own class back.

    Args:
        module: has its own class, or one that this function gave it.
        kind: what it becomes; None for what it was.
        switch: which share of the patches stays; None for none.
    """
    plain = plain_class(module)
    module.__class__ = plain if kind is None else derived_class(plain, kind)
    module.__dict__.pop("token_switch", None)
    if switch is not None:
        module.__dict__["token_switch"] = switch


def _revived(plain: type[nn.Module], kind: type[Switched]) -> nn.Module:
    """Return a module of a derived class without its state, for copies and pickles."""
    cls = derived_class(plain, kind)
    return cls.__new__(cls)
