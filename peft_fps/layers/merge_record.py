"""Merging a sparse change into one layer's weight and undoing that, bit for bit."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from peft_fps.base.packed_weight import PackedWeight
from peft_fps.base.quantisation import dense_weight, held_by, put, quantisation
from peft_fps.base.substitution import twin_with
from peft_fps.sparse import Structure, merged_entries, sums


@dataclass(frozen=True)
class MergeRecord:
    """What a merge overwrote, and how much of the change was lost to rounding.

    Attributes:
        positions: `(nnz,)` positions in the flattened weight.
        weight: `(nnz,)` original entries.
        bias: `(neurons,)` original bias, None if the adapter has no bias delta here.
        changes: number of changes that are not zero, bias deltas included. It is counted only where the weight has
            less precision than the sum, and 0 elsewhere.
        lost: number of these that did not change the stored number; of a quantised weight, those that changed it by
            less than half of the change.
        held: attributes that held a quantised weight, whose entries cannot be restored one by one. None for other
            weights; `positions` and `weight` are empty if it is not None.
    """

    positions: Tensor
    weight: Tensor
    bias: Tensor | None
    changes: int
    lost: int
    held: Mapping[str, Any] | None = None


@torch.no_grad()
def merge_entries(base: Any, structure: Structure, values: Tensor, bias_delta: Tensor | None) -> MergeRecord:
    """Add a sparse change to a layer in place. Sums are formed in float32 and rounded once.

    If anything is raised, the layer is as it was.

    Args:
        base: the layer, with an unquantised weight.
        structure: positions of the entries.
        values: `(nnz,)` changes of the entries.
        bias_delta: `(neurons,)`, None if there is none.
    """
    positions, changes, lost = structure.positions, 0, 0
    if base.weight.dtype == values.dtype == torch.float32 and base.weight.is_contiguous():
        before, after = base.weight.reshape(-1).index_select(0, positions), None
    else:
        before, after = merged_entries(base.weight, values, positions)
    try:
        if after is None:
            base.weight.view(-1).index_add_(0, positions, values)
        else:
            _write(base.weight, positions, after)
            changes, lost = _lost_changes(before, after, values)
        bias, changes_of_bias, lost_of_bias = add_to_bias(base, bias_delta)
    except BaseException:
        _write(base.weight, positions, before)
        raise
    return MergeRecord(positions, before, bias, changes + changes_of_bias, lost + lost_of_bias)


@torch.no_grad()
def add_to_bias(base: Any, delta: Tensor | None) -> tuple[Tensor | None, int, int]:
    """Add a delta to a layer's bias in place.

    Args:
        base: the layer.
        delta: `(neurons,)`, None if there is none.

    Returns:
        The original bias, and the numbers of changes and of lost changes as in `MergeRecord`.
    """
    if delta is None:
        return None, 0, 0
    delta = delta.view_as(base.bias)  # a norm's bias may have several dimensions
    if base.bias.dtype == delta.dtype == torch.float32:
        before = base.bias.detach().clone()
        base.bias.add_(delta)
        return before, 0, 0
    before, after = sums(base.bias.detach().clone(), delta)
    counts = _lost_changes(before, after, delta)
    base.bias.copy_(after)
    return before, *counts


@torch.no_grad()
def restore_entries(base: Any, record: MergeRecord) -> MergeRecord:
    """Undo a merge in place. The layer may have another device or dtype by now.

    If anything is raised, the layer is as it was.

    Returns:
        The record of what was overwritten. Restoring it merges again, bit for bit.
    """
    merged = replace(
        record,
        weight=record.weight if record.held is not None else _read(base.weight, record.positions),
        bias=None if record.bias is None else base.bias.detach().clone(),
        held=None if record.held is None else held_by(base),
    )
    try:
        _overwrite(base, record)
    except BaseException:
        _overwrite(base, merged)
        raise
    return merged


def _overwrite(base: Any, record: MergeRecord) -> None:
    """Write what the record holds into the layer."""
    if record.held is None:
        _write(base.weight, record.positions, record.weight)
    else:
        put(base, record.held)
    if record.bias is not None:
        base.bias.copy_(record.bias)


def is_finite(base: Any, record: MergeRecord) -> bool:
    """Return whether everything that the merge of `record` wrote into the layer is finite."""
    written = [_read(base.weight, record.positions) if record.held is None else dense_weight(base)]
    if record.bias is not None:
        written.append(base.bias.detach())
    return all(bool(torch.isfinite(tensor).all()) for tensor in written)


def _lost_changes(before: Tensor, after: Tensor, change: Tensor) -> tuple[int, int]:
    """Return how many changes were not zero, and how many of these were lost to rounding; 0, 0 for full precision."""
    if before.dtype.itemsize >= torch.promote_types(change.dtype, torch.float32).itemsize:
        return 0, 0
    wanted = change != 0
    return int(wanted.sum()), int((wanted & (before == after)).sum())


def independent_copy(base: Any) -> Any:
    """Return a layer that computes as `base` does, hooks included, with weight and bias of its own.

    A quantised weight is shared, since merging and unmerging replace it as a whole.

    Args:
        base: any layer; stays untouched. See `twin_with` for forwards that were put over its own.
    """
    if isinstance(base, PackedWeight):
        return base.copied()
    kind = quantisation(base)
    shared = None if kind is None else kind.weight
    own = {
        name: parameter.detach().clone()
        for name, parameter in base._parameters.items()
        if parameter is not None and name != shared
    }
    twin = twin_with(base, own)
    if kind is not None and "bias" in vars(base) and base.bias is not None:  # HQQ's is no parameter
        twin.bias = base.bias.detach().clone()
    return twin


def unmerged_copy(base: Any, records: Iterable[MergeRecord]) -> Any:
    """Return a copy of the layer as it was before it was merged.

    Args:
        base: the layer; stays untouched.
        records: of its merges, the latest first.
    """
    copied = independent_copy(base)
    for record in records:
        restore_entries(copied, record)
    return copied


def _read(source: Tensor, positions: Tensor) -> Tensor:
    """Return the entries at `positions` of the flattened tensor."""
    return source.detach().reshape(-1).index_select(0, positions.to(source.device))


def _write(target: Tensor, positions: Tensor, entries: Tensor) -> None:
    """Write entries at `positions` of the flattened tensor in place.

    Autograd sees the write, so that it refuses a backward that still needs the old numbers.
    """
    # a model may have been moved, or cast, while it was merged
    positions, entries = positions.to(target.device, torch.int64), entries.to(target)
    if target.is_contiguous():
        target.view(-1).index_copy_(0, positions, entries)
    else:  # channels-last convolutions, transposed views
        target[torch.unravel_index(positions, target.shape)] = entries
