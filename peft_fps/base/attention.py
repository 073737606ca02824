"""The projections of `nn.MultiheadAttention`, which it reads without calling a layer, each seen as a layer.

`in_proj` is the tensor of query, key and value projection, and `out_proj` the layer behind the heads.
"""

from typing import Any

from torch import nn

from peft_fps.base.packed_weight import PackedWeight


PROJECTIONS = ("in_proj", "out_proj")


class Projection(PackedWeight):
    """A projection of an attention module, of shape `(matrices * out, in)`: three matrices in `in_proj`, else one.

    Attributes:
        attention: the module.

    Args:
        attention: the module.
        own: one of `PROJECTIONS`.
    """

    attention: Any
    gated = False

    def __init__(self, attention: Any, own: str) -> None:
        inner = own == "in_proj"
        super().__init__(attention if inner else attention.out_proj, "in_proj_weight" if inner else "weight")
        self.__dict__["attention"] = attention
        self.own = own

    @property
    def bias_name(self) -> str:
        """Name of the bias beside the weight."""
        return self.name.replace("weight", "bias")

    @property
    def stand_in_names(self) -> tuple[str, str]:
        """Names of weight and bias in the attention module."""
        where = "" if self.own == "in_proj" else "out_proj."
        return f"{where}{self.name}", f"{where}{self.bias_name}"

    @property
    def stacked(self) -> Any:
        """The weight as `(matrices, out, in)`."""
        return self.weight.unflatten(0, (3 if self.own == "in_proj" else 1, -1))


def has_projections(module: Any) -> bool:
    """Whether a module is an attention of torch's own forward, with one tensor for query, key and value."""
    if not isinstance(module, nn.MultiheadAttention) or type(module).forward is not nn.MultiheadAttention.forward:
        return False
    inner, outer = module._parameters.get("in_proj_weight"), module.out_proj._parameters.get("weight")
    return module._qkv_same_embed_dim and inner is not None and outer is not None
