"""The inputs of the projections of `nn.MultiheadAttention`, which no layer is called with.

Query, key and value are arguments of its call. What its output projection multiplies is its output with an identity in
that projection's place, for which the module runs once more.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft_fps.base.attention import Projection
from peft_fps.base.substitution import twin_with
from peft_fps.calibration.statistics import check_dense


Receive = Callable[[Projection, str, int, Tensor, None], None]
"""Takes a projection, its path, the index of a matrix, and its inputs `(positions, inputs)`, batch first: all rows."""


def watch_attention(weights: Mapping[str, Projection], receive: Receive) -> list[Any]:
    """Hand over the inputs of projections in each call of the modules that own them.

    Args:
        weights: by path.
        receive: gets the inputs.

    Returns:
        Handles of hooks, to be removed.
    """
    return [
        weight.attention.register_forward_pre_hook(_hook(path, weight, receive), with_kwargs=True)
        for path, weight in weights.items()
    ]


def _hook(path: str, weight: Projection, receive: Receive) -> Any:
    """Return a forward pre-hook of an attention that hands over the inputs of one of its projections."""

    def of_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        for matrix, name in enumerate(("query", "key", "value")):
            receive(weight, path, matrix, _batch_first(named[name], module, path), None)

    def of_heads(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        receive(weight, path, 0, _batch_first(heads_of(module, *args, **kwargs), module, path), None)

    return of_arguments if weight.own == "in_proj" else of_heads


@torch.no_grad()
def heads_of(attention: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Return what the output projection of an attention multiplies in a call, in the form of the call's output."""
    weight = attention.out_proj.weight
    tensors = {"weight": torch.eye(weight.shape[0], dtype=weight.dtype, device=weight.device)}
    if attention.out_proj.bias is not None:
        tensors["bias"] = torch.zeros_like(attention.out_proj.bias)
    twin = twin_with(attention, {})
    twin.__dict__["_modules"] = attention._modules | {"out_proj": twin_with(attention.out_proj, tensors)}
    output, _ = type(attention).forward(twin, *args, **kwargs)  # without hooks, which would call this again
    result: Tensor = output
    return result


def _batch_first(x: Tensor, attention: Any, path: str) -> Tensor:
    """Return an attention's tensor as rows `(positions, size)`, batch first. Raise ValueError if it is nested."""
    check_dense(path, x)
    ordered = x if attention.batch_first or x.dim() == 2 else x.transpose(0, 1)
    return ordered.reshape(-1, x.shape[-1])
