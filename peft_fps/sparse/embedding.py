"""Lookups in W + ΔW, and the products of other layers that share this weight. Only touched tokens cost anything.

An embedding is a linear layer over one-hot tokens. An output neuron is one dimension of the embedding, its inputs are
the tokens, and the weight is stored as `(inputs, neurons)`. A touched token is one that has an entry:
`structure.union` lists them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_fps.sparse.compose import compact_delta
from peft_fps.sparse.structure import Structure
from peft_fps.sparse.transforms import FirstDerivative, is_differentiated_again, needs_operators


class _ChangedLookup(torch.autograd.Function):
    """`rows + ΔW[tokens]` for `rows` `(positions, neurons)`; the arguments are those of `changed_lookup`."""

    @staticmethod
    def forward(rows: Tensor, tokens: Tensor, values: Tensor, structure: Structure, padding: int | None) -> Tensor:
        places, entries, _ = _hits(tokens, structure, rows.shape[1])
        flat = rows.reshape(-1)
        exact = torch.promote_types(torch.promote_types(rows.dtype, values.dtype), torch.float32)
        after = flat.index_select(0, places).to(exact) + values.index_select(0, entries).to(exact)
        return flat.index_copy(0, places, after.to(rows.dtype)).view(rows.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, tokens, values, ctx.structure, ctx.padding = inputs
        ctx.save_for_backward(tokens, values)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        tokens, values = ctx.saved_tensors
        if not ctx.needs_input_grad[2]:
            return grad_output, None, None, None, None
        again = is_differentiated_again()
        with torch.no_grad():
            places, entries, positions = _hits(tokens, ctx.structure, grad_output.shape[1])
            gradients = grad_output.reshape(-1).index_select(0, places)
            wide = gradients.to(torch.promote_types(gradients.dtype, torch.float32))
            if ctx.padding is not None:  # as in torch, whose padding row gets no gradient
                wide = wide.masked_fill(tokens.index_select(0, positions) == ctx.padding, 0)
            grad_values = wide.new_zeros(values.shape).index_add_(0, entries, wide).to(values.dtype)
        if again:
            grad_values = FirstDerivative.apply(grad_values, values, grad_output)
        return grad_output, None, grad_values, None, None


def _hits(tokens: Tensor, structure: Structure, neurons: int) -> tuple[Tensor, Tensor, Tensor]:
    """Find the entries that a lookup reads.

    Args:
        tokens: `(positions,)` integers.
        structure: where the selected entries lie.
        neurons: of the embedding.

    Returns:
        For every entry of every position: its place in the flattened `(positions, neurons)` output, its index among
        the entries, and its position, `(hits,)` int64 each.
    """
    order, entry_neurons, starts = structure.by_column
    first = starts[tokens].to(torch.int64)
    last = starts[(tokens + 1).clamp(max=structure.inputs - 1)].to(torch.int64)
    last = last.masked_fill(tokens == structure.inputs - 1, order.numel())
    counts = last - first
    positions = torch.repeat_interleave(counts)
    before = counts.cumsum(0) - counts
    hits = torch.arange(positions.numel(), device=tokens.device) + (first - before).index_select(0, positions)
    places = positions * neurons + entry_neurons.index_select(0, hits)
    return places, order.index_select(0, hits).to(torch.int64), positions


def changed_lookup(
    rows: Tensor, tokens: Tensor, values: Tensor, structure: Structure, padding: int | None = None
) -> Tensor:
    """Return `rows + ΔW[tokens]`, where `rows` is what a lookup of the tokens in W gives.

    Sums are formed in float32 or float64 and rounded once, so that rows equal those of a merged weight bit for bit.
    `rows` and `values` get gradients. Neither a dense ΔW nor a dense gradient of it is formed.

    Args:
        rows: `(..., neurons)`.
        tokens: `(...)` integers from 0 to `structure.inputs - 1`.
        values: `(nnz,)` ΔW at the selected entries.
        structure: where the selected entries lie.
        padding: token whose entries get no gradient, as `padding_idx` of `torch.nn.Embedding`. Default: none.

    Returns:
        `(..., neurons)` in the dtype of `rows`.
    """
    if values.numel() == 0 or tokens.numel() == 0:
        return rows
    if needs_operators(rows) or needs_operators(values) or torch.compiler.is_compiling():
        return _by_operators(rows, tokens, values, structure, padding)
    flat, neurons = tokens.reshape(-1).to(torch.int64), structure.neurons
    result: Tensor = _ChangedLookup.apply(rows.reshape(-1, neurons), flat, values, structure, padding)
    return result.view(rows.shape)


def _by_operators(rows: Tensor, tokens: Tensor, values: Tensor, structure: Structure, padding: int | None) -> Tensor:
    """Return `changed_lookup` by operators whose shapes do not depend on the tokens, over a compact ΔW."""
    exact = torch.promote_types(torch.promote_types(rows.dtype, values.dtype), torch.float32)
    delta = compact_delta(values, structure, exact).t()
    slots = torch.searchsorted(structure.union, tokens.to(torch.int64)).clamp(max=structure.union.numel() - 1)
    touched = structure.union[slots] == tokens
    change = F.embedding(slots, delta)
    if padding is not None:
        change = torch.where((tokens == padding)[..., None], change.detach(), change)
    return torch.where(touched[..., None], (rows.to(exact) + change).to(rows.dtype), rows)


def add_token_products(logits: Tensor, x: Tensor, values: Tensor, structure: Structure, weight: Tensor) -> Tensor:
    """Return `logits + x ΔWᵀ`, for a linear layer from neurons to tokens that shares the weight of an embedding.

    A weight of half precision counts as changed by what a merge would change it by, which rounds the sum once. `x` and
    `values` get gradients of any order. The logits are overwritten where autograd allows it.

    Args:
        logits: `(..., inputs)`, what the layer gives with W. The gradient passes to them unchanged.
        x: `(..., neurons)`.
        values: `(nnz,)` ΔW at the selected entries.
        structure: where the selected entries lie in the embedding.
        weight: the shared weight W, `(inputs, neurons)`.
    """
    if values.numel() == 0:
        return logits
    if weight.dtype.itemsize < 4:
        before = weight.detach().reshape(-1).index_select(0, structure.positions).float()
        values = (before + values).to(weight.dtype).float() - before
    with torch.autocast(x.device.type, enabled=False):
        change = x.to(logits.dtype) @ compact_delta(values, structure, logits.dtype)
    traced = torch.compiler.is_compiling() or needs_operators(logits) or needs_operators(values)
    add = torch.Tensor.index_add if traced else torch.Tensor.index_add_
    return add(logits, -1, structure.union, change)
