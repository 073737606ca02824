"""Dense tensors of W + ΔW, for one product or for a merge."""

import torch
from torch import Tensor

from peft_fps.sparse.structure import Structure


def merged_entries(weight: Tensor, values: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return the selected entries of `weight` before and after adding `values`.

    The sum is formed in float32, or in float64 if either side is float64. It is rounded once to the weight's dtype, so
    that a half-precision weight loses as little of the change as its dtype allows.

    Args:
        weight: stored weight of any shape.
        values: `(nnz,)` ΔW at the selected entries.
        positions: `(nnz,)` positions in the flattened weight, without repetition.

    Returns:
        Two `(nnz,)` tensors in the weight's dtype.
    """
    return sums(weight.reshape(-1).index_select(0, positions), values)


def sums(before: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
    """Return `before`, and `before + change` in the dtype of `before`.

    The sum is formed in float32 or float64 and rounded once.
    """
    exact = torch.promote_types(torch.promote_types(before.dtype, change.dtype), torch.float32)
    return before, (before.to(exact) + change.to(exact)).to(before.dtype)


def compose_weight(weight: Tensor, values: Tensor, structure: Structure, dtype: torch.dtype) -> Tensor:
    """Return a new dense W + ΔW in the stored shape and in `dtype`. The function does not write to the weight.

    Args:
        weight: stored weight of any shape.
        values: `(nnz,)` ΔW at the selected entries.
        structure: where the selected entries lie.
        dtype: dtype of the product that uses the result.
    """
    composed = weight.to(dtype, copy=True, memory_format=torch.contiguous_format)
    if weight.dtype == values.dtype == dtype == torch.float32:
        composed.view(-1).index_add_(0, _exported(structure.positions), values)
    else:
        exact = torch.promote_types(torch.promote_types(weight.dtype, values.dtype), torch.float32)
        before = weight.reshape(-1).index_select(0, structure.positions)
        after = (before.to(exact) + values.to(exact)).to(dtype)
        composed.view(-1).index_copy_(0, structure.positions.to(torch.int64), after)
    return composed


def changed_weight(weight: Tensor, values: Tensor, structure: Structure) -> Tensor:
    """Return a new dense W + ΔW in the stored shape and dtype of `weight`, with a gradient for `values`.

    Entries are summed in float32 or float64 and rounded once. They equal what a merge writes.

    Args:
        weight: stored weight of any shape; it gets no gradient.
        values: `(nnz,)` ΔW at the selected entries.
        structure: where the selected entries lie.
    """
    positions = structure.positions.to(torch.int64)
    flat = weight.detach().reshape(-1)
    exact = torch.promote_types(torch.promote_types(weight.dtype, values.dtype), torch.float32)
    after = (flat.index_select(0, positions).to(exact) + values.to(exact)).to(weight.dtype)
    return flat.index_copy(0, positions, after).view(weight.shape)


def _exported(positions: Tensor) -> Tensor:
    """Return positions as int64 while a model is exported, since ONNX scatters by no other integers."""
    return positions.to(torch.int64) if torch.compiler.is_exporting() else positions


def dense_delta(values: Tensor, structure: Structure, shape: torch.Size) -> Tensor:
    """Return ΔW as a dense tensor.

    Args:
        values: `(nnz,)` ΔW at the selected entries.
        structure: where the selected entries lie.
        shape: shape of the stored weight.

    Returns:
        A tensor of that shape in the dtype of `values`, zero at all other entries.
    """
    return values.new_zeros(shape.numel()).index_add(0, _exported(structure.positions), values).view(shape)


def compact_delta(values: Tensor, structure: Structure, dtype: torch.dtype) -> Tensor:
    """Return ΔW over the needed columns.

    Args:
        values: `(nnz,)` ΔW at the selected entries.
        structure: where the selected entries lie; `structure.union` lists the needed columns.
        dtype: dtype of the result.

    Returns:
        `(neurons, used)`, zero at all other entries.
    """
    used = structure.union.numel()
    flat = values.new_zeros(structure.neurons * used, dtype=dtype)
    places = structure.rows.to(torch.int64) * used + structure.union_positions
    return flat.index_copy(0, places, values.to(dtype)).view(structure.neurons, used)
