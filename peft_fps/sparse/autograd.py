"""Products of linear layers with W + ΔW whose backward keeps neither a dense W + ΔW nor a dense ∂L/∂W.

The forward saves the weight (an alias), the values, and those columns of the input that a selected entry reads (see
`keeping`). The gradient of the values is a sampled dense-dense product: `gᵀ x` at the selected entries, with g the
gradient of the output (see `products`).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_fps.sparse.compose import compact_delta, compose_weight
from peft_fps.sparse.keeping import NOTHING, Kept, keep_own_columns
from peft_fps.sparse.products import add_input_gradient, added_product, adding_is_cheaper, sampled_product
from peft_fps.sparse.structure import Structure
from peft_fps.sparse.transforms import FirstDerivative, dense_sum, is_differentiated_again, needs_operators


class _SparseLinear(torch.autograd.Function):
    """`x (W + ΔW)ᵀ + bias` for `x` `(tokens, inputs)`; the arguments are those of `sparse_linear`."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, values: Tensor, bias: Tensor | None, structure: Structure, kept: Kept | None
    ) -> Tensor:
        if adding_is_cheaper(x, weight, values, structure):
            result = F.linear(x, _by_neuron(weight, structure), bias)
            return result.add_(added_product(x, values, structure))
        return F.linear(x, _by_neuron(compose_weight(weight, values, structure, x.dtype), structure), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, values, _, structure, kept = inputs
        ctx.structure = structure
        kept = _kept(ctx.needs_input_grad[2], x, structure, kept)
        ctx.columns = kept.columns
        ctx.save_for_backward(weight, values, *kept.tensors)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        weight, values, *tensors = ctx.saved_tensors
        need_x, _, need_values, need_bias, *_ = ctx.needs_input_grad
        grad_x = grad_values = grad_bias = None
        with torch.autocast(grad_output.device.type, enabled=False):
            if need_values:
                grad_values, grad_bias = _gradient_of_values(grad_output, values, ctx.columns, tensors, ctx.structure)
            if need_bias:
                grad_bias = grad_output.sum(0) if grad_bias is None else grad_bias.to(grad_output.dtype)
            if need_x:  # last: the next node of the graph reads this gradient, which is still in the cache
                grad_x = _input_gradient(grad_output, weight, values, ctx.structure)
        return grad_x, None, grad_values, grad_bias if need_bias else None, None, None


def _by_neuron(stored: Tensor, structure: Structure) -> Tensor:
    """Return a linear layer's matrix, stored as `(neurons, inputs)` or `(inputs, neurons)`, as `(neurons, inputs)`."""
    return stored.t() if structure.transposed else stored


def _input_gradient(grad_output: Tensor, weight: Tensor, values: Tensor, structure: Structure) -> Tensor:
    """Return `grad_output (W + ΔW)`, `(tokens, inputs)`.

    Args:
        grad_output: `(tokens, neurons)`; its dtype is the dtype of the product.
        weight: stored weight, `(neurons, inputs)`, or `(inputs, neurons)` if `structure.transposed`.
        values: `(nnz,)` ΔW at the selected entries.
        structure: where the selected entries lie.
    """
    if is_differentiated_again():
        return grad_output @ _by_neuron(dense_sum(weight, values, structure, grad_output.dtype), structure)
    if adding_is_cheaper(grad_output, weight, values, structure):
        grad_x = grad_output @ _by_neuron(weight, structure)
        add_input_gradient(grad_x, grad_output, values, structure)
        return grad_x
    return grad_output @ _by_neuron(compose_weight(weight, values, structure, grad_output.dtype), structure)


def _gradient_of_values(
    grad_output: Tensor, values: Tensor, columns: Callable[..., Tensor], kept: list[Tensor], structure: Structure
) -> tuple[Tensor, Tensor | None]:
    """Return the gradient of the values, and the gradient of the bias that comes with it.

    Args:
        grad_output: `(tokens, neurons)`.
        values: `(nnz,)` ΔW at the selected entries.
        columns: makes the needed columns of the input from the kept tensors; see `Kept`.
        kept: tensors that the forward kept.
        structure: where the selected entries lie.

    Returns:
        `(nnz,)` in the dtype of `values`, and `(neurons,)`, the sum of `grad_output` over the tokens. The sum is None
        if the backward is differentiated again.
    """
    if not is_differentiated_again():
        product, sums = sampled_product(grad_output, columns(*kept), structure)
        return product.to(values.dtype), sums
    with torch.no_grad():
        product, _ = sampled_product(grad_output, columns(*kept), structure)
    return FirstDerivative.apply(product.to(values.dtype), values, grad_output), None


class _SparseDeltaLinear(torch.autograd.Function):
    """`x ΔWᵀ` for `x` `(tokens, inputs)`; the arguments are those of `sparse_delta_linear`."""

    @staticmethod
    def forward(x: Tensor, values: Tensor, structure: Structure, kept: Kept | None) -> Tensor:
        return F.linear(x.index_select(-1, structure.union), compact_delta(values, structure, x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, values, structure, kept = inputs
        ctx.structure, ctx.input_shape = structure, x.shape
        kept = _kept(ctx.needs_input_grad[1], x, structure, kept)
        ctx.columns = kept.columns
        ctx.save_for_backward(values, *kept.tensors)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        values, *tensors = ctx.saved_tensors
        structure = ctx.structure
        grad_x = grad_values = None
        with torch.autocast(grad_output.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                part = grad_output @ compact_delta(values, structure, grad_output.dtype)
                grad_x = part.new_zeros(ctx.input_shape).index_copy(-1, structure.union, part)
            if ctx.needs_input_grad[1]:
                grad_values, _ = _gradient_of_values(grad_output, values, ctx.columns, tensors, structure)
        return grad_x, grad_values, None, None


def _kept(needed: bool, x: Tensor, structure: Structure, kept: Kept | None) -> Kept:
    """Return what the product keeps of its input for backward.

    Args:
        needed: whether the values need a gradient. Without one, nothing is kept.
        x: `(tokens, inputs)`.
        structure: where the selected entries lie.
        kept: choice of the caller. Default: the needed columns of `x`.
    """
    if not needed:
        return NOTHING
    return kept or keep_own_columns(x, structure)


def sparse_linear(
    x: Tensor,
    weight: Tensor,
    values: Tensor,
    bias: Tensor | None,
    structure: Structure,
    kept: Kept | None = None,
) -> Tensor:
    """Return `x (W + ΔW)ᵀ + bias`.

    `x`, `values` and `bias` get gradients, `weight` gets none. The gradients of `x` and `bias` can be differentiated
    again. The gradient of `values` can be differentiated again only within torch.func.

    Args:
        x: `(..., inputs)`; its dtype is the dtype of the product.
        weight: stored weight, `(neurons, inputs)`, or `(inputs, neurons)` if `structure.transposed`.
        values: `(nnz,)` ΔW at the selected entries.
        bias: `(neurons,)` in the dtype of `x`, or None.
        structure: where the selected entries lie.
        kept: what to keep of the input for backward. Default: its needed columns.

    Returns:
        `(..., neurons)` in the dtype of `x`.
    """
    flat = x.reshape(-1, structure.inputs)
    with torch.autocast(x.device.type, enabled=False):
        if needs_operators(x):
            return F.linear(x, _by_neuron(dense_sum(weight, values, structure, x.dtype), structure), bias)
        # two dimensions inside, so that what leaves the function is no view: callers may add to it in place
        product = _SparseLinear.apply if torch.is_grad_enabled() else _SparseLinear.forward
        result = product(flat, weight, values, bias, structure, kept)
    return result.view(*x.shape[:-1], structure.neurons)


def sparse_delta_linear(x: Tensor, values: Tensor, structure: Structure, kept: Kept | None = None) -> Tensor:
    """Return `x ΔWᵀ`, for base layers whose own forward computes `x Wᵀ + bias`.

    `x` and `values` get gradients, as in `sparse_linear`.

    Args:
        x: `(..., inputs)`; its dtype is the dtype of the product.
        values: `(nnz,)` ΔW at the selected entries.
        structure: where the selected entries lie.
        kept: what to keep of the input for backward. Default: its needed columns.

    Returns:
        `(..., neurons)` in the dtype of `x`.
    """
    with torch.autocast(x.device.type, enabled=False):
        if needs_operators(x):
            return F.linear(x.index_select(-1, structure.union), compact_delta(values, structure, x.dtype))
        result = _SparseDeltaLinear.apply(x.reshape(-1, structure.inputs), values, structure, kept)
    return result.view(*x.shape[:-1], structure.neurons)
