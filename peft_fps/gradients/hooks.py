"""Gradients of chosen weights, handed over one by one as backward forms them, and never held together."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer


@contextmanager
def gradients_handed_over(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], receive: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Give every gradient to `receive` when it is complete, and free it before the next one is formed.

    Within the block no other parameter of the model gets a gradient. What required grad before, and gradients that
    were there before, are put back whatever happens.

    Args:
        model: holds all parameters.
        parameters: the wanted ones, by any name.
        receive: called with the name and the gradient, in the parameter's shape and dtype, once per backward pass.
    """
    everything = {id(p): p for p in model.parameters()} | {id(p): p for p in parameters.values()}
    before = [(p, p.requires_grad, p.grad) for p in everything.values()]
    handles = []
    try:
        for parameter in everything.values():
            parameter.requires_grad_(False)
            parameter.grad = None
        for name, parameter in parameters.items():
            parameter.requires_grad_(True)
            handles.append(parameter.register_post_accumulate_grad_hook(_handing_over(name, receive)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient


@contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Let gradient checkpointing that is switched on work in evaluation mode too, where transformers leaves it off.

    Always without reentrance, which would give no gradient behind frozen embeddings.
    """
    layers = [
        module
        for module in model.modules()
        if isinstance(module, GradientCheckpointingLayer)
        and module.gradient_checkpointing
        and "forward" not in vars(module)
    ]
    try:
        for layer in layers:
            layer.gradient_checkpointing = False
            reads_only = getattr(layer, "_can_checkpoint_with_cache", False)
            layer.forward = _recomputed(layer.forward, with_cache=reads_only)
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = True
            vars(layer).pop("forward", None)


def _recomputed(forward: Callable[..., Any], with_cache: bool) -> Callable[..., Any]:
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not with_cache:  # as transformers does: a cache must not be filled a second time
            args = tuple(None if isinstance(value, Cache) else value for value in args)
            kwargs = {name: None if isinstance(value, Cache) else value for name, value in kwargs.items()}
        return checkpoint(partial(forward, **kwargs), *args, use_reentrant=False)

    return recomputed


def _handing_over(name: str, receive: Callable[[str, Tensor], None]) -> Callable[[Tensor], None]:
    @torch.no_grad()
    def hook(parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        receive(name, gradient)

    return hook
