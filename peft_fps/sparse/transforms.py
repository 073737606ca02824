"""Products as plain PyTorch operators, for transforms that do not support our autograd functions.

These are torch.func (`grad`, `jvp`, `vmap`, `hessian`, ...), forward-mode derivatives, `torch.jit.trace`, and second
derivatives. W + ΔW is a dense tensor of the graph then, and so is its gradient.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from peft_fps.sparse.compose import dense_delta
from peft_fps.sparse.structure import Structure


def needs_operators(tensor: Tensor) -> bool:
    """Whether a product has to be made of plain operators.

    It has to within a transform of torch.func, a forward-mode derivative or `torch.jit.trace`, and in a backward pass
    for many gradients at once (`is_grads_batched=True`). Never under `torch.compile`.

    Args:
        tensor: the input of the product, or in backward the gradient of its output.
    """
    if torch.compiler.is_compiling():
        return False
    return is_transformed() or torch._C._functorch.is_legacy_batchedtensor(tensor)


def is_transformed() -> bool:
    """Whether a transform of torch.func, a forward-mode derivative or `torch.jit.trace` is at work."""
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    return transformed or is_jit_tracing()


def outside_transforms(tensor: Tensor) -> AbstractContextManager[Any]:
    """Let what is made of a tensor within the block outlive a transform of torch.func, unless the tensor is its own.

    A transform wraps every tensor that is made while it runs, and the wrappers are empty when it has ended.
    """
    active = torch._C._are_functorch_transforms_active()
    own = active and torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return torch._C._DisableFuncTorch() if active and not own else nullcontext()


def is_jit_tracing() -> bool:
    """Whether `torch.jit.trace` traces the code that calls this function."""
    return torch._C._get_tracing_state() is not None


def is_differentiated_again() -> bool:
    """Whether the backward pass that calls this function is to be differentiated again (`create_graph=True`)."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def dense_sum(weight: Tensor, values: Tensor, structure: Structure, dtype: torch.dtype) -> Tensor:
    """Return what `compose_weight` returns, made of operators with derivatives of any order for weight and values.

    Args:
        weight: stored weight of any shape.
        values: `(nnz,)` ΔW at the selected entries.
        structure: where the selected entries lie.
        dtype: dtype of the product that uses the result.
    """
    exact = torch.promote_types(torch.promote_types(weight.dtype, values.dtype), torch.float32)
    return (weight.to(exact) + dense_delta(values.to(exact), structure, weight.shape)).to(dtype)


class FirstDerivative(torch.autograd.Function):
    """The gradient of the values as a node of the graph that refuses a second derivative.

    A second derivative needs the input as a tensor of the graph. Only its needed columns are kept, outside the graph.
    """

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *of: Tensor) -> Tensor:
        """Return the gradient of the values, which requires grad if one of the tensors it is a function `of` does."""
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> None:
        """Raise ValueError, which says how to get second derivatives."""
        raise ValueError(
            "A gradient with respect to fps_values is differentiated again, expected first derivatives of the "
            "values (second derivatives with respect to inputs work). Compute it with torch.func (hessian, or jvp of "
            "grad), whose derivatives of any order work, or merge the adapter with model.merge_and_unload()."
        )
