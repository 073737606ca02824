"""Hooks that hand over the gradients of chosen weights one by one, so that memory holds one gradient at a time."""

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
    """Pass every gradient to `receive` when it is complete, and free it before the next one is formed.

    Within the block no other parameter of the model gets a gradient. Afterwards, after an error too, every parameter
    has the `requires_grad` and the gradient that it had before.

    Args:
        model: model with all parameters.
        parameters: parameters that need gradients, by any name.
        receive: takes the name of a parameter and its gradient, in the parameter's shape and dtype. It is called once
            per parameter and backward pass.
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
    """Apply gradient checkpointing, if the model has it switched on, in evaluation mode too.

    transformers applies it in training mode only. The block uses the variant without reentrance, because the other one
    gives no gradients behind frozen embeddings.
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
    """Return a forward with gradient checkpointing.

    Args:
        forward: forward of a layer.
        with_cache: whether the layer gets caches of keys and values. It may if it only reads them.
    """

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not with_cache:  # as in transformers, because recomputation would fill a cache a second time
            args = tuple(None if isinstance(value, Cache) else value for value in args)
            kwargs = {name: None if isinstance(value, Cache) else value for name, value in kwargs.items()}
        return checkpoint(partial(forward, **kwargs), *args, use_reentrant=False)

    return recomputed


def _handing_over(name: str, receive: Callable[[str, Tensor], None]) -> Callable[[Tensor], None]:
    """Return a hook that frees the gradient of a parameter and passes it to `receive` with the name."""

    @torch.no_grad()
    def hook(parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        receive(name, gradient.to_dense() if gradient.is_sparse else gradient)  # of an embedding with sparse=True

    return hook
