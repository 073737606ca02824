"""The products in operators alone, for what knows of operators and not of our autograd functions.

Those are torch.func (`grad`, `jvp`, `vmap`, `hessian`, ...), forward-mode derivatives, `torch.jit.trace`, and second
derivatives. W + ΔW is formed as a dense tensor of the graph, so a dense gradient of it is formed too.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from peft_fps.sparse.compose import dense_delta
from peft_fps.sparse.structure import Structure


def needs_operators(tensor: Tensor) -> bool:
    """Whether a transform of torch.func, a forward-mode derivative or `torch.jit.trace` is at work.

    Or a backward for many gradients at once (`is_grads_batched=True`), as told by the gradient of the output.
    """
    if torch.compiler.is_compiling():
        return False
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    return transformed or is_jit_tracing() or torch._C._functorch.is_legacy_batchedtensor(tensor)


def is_jit_tracing() -> bool:
    """Whether `torch.jit.trace` is at work."""
    return torch._C._get_tracing_state() is not None


def is_differentiated_again() -> bool:
    """Whether a backward is to be differentiated in its turn (`create_graph=True`), as asked for within it."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def dense_sum(weight: Tensor, values: Tensor, structure: Structure, dtype: torch.dtype) -> Tensor:
    """Return what `compose_weight` returns, as a function of weight and values that can be differentiated anyhow."""
    exact = torch.promote_types(torch.promote_types(weight.dtype, values.dtype), torch.float32)
    composed = (weight.to(exact) + dense_delta(values.to(exact), structure, weight.shape)).to(dtype)
    return composed.t() if structure.transposed else composed


class FirstDerivative(torch.autograd.Function):
    """Passes on the gradient of the values as the graph's, and refuses to differentiate it again.

    That would take the whole input, of which only the needed columns are kept, and outside the graph.
    """

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *of: Tensor) -> Tensor:
        """Return the gradient, which then requires grad as those it is a function `of` do."""
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> None:
        """Raise ValueError."""
        raise ValueError(
            "A gradient with respect to fps_values is differentiated again, expected first derivatives of the "
            "values (second derivatives with respect to inputs work). Compute it with torch.func (hessian, or jvp of "
            "grad), whose derivatives of any order work, or merge the adapter with model.merge_and_unload()."
        )
