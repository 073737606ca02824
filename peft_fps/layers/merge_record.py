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
        written: `(nnz,)` what the merge has made of them.
        bias: `(neurons,)` original bias, None if the adapter has no bias delta here.
        written_bias: what the merge has made of it.
        changes: number of changes that are not zero, bias deltas included. It is counted only where the weight has
            less precision than the sum, and 0 elsewhere.
        lost: number of these that did not change the stored number; of a quantised weight, those that changed it by
            less than half of the change.
        held: attributes that held a quantised weight, whose entries cannot be restored one by one. None for other
            weights; `weight` is empty if it is not None.
    """

    positions: Tensor
    weight: Tensor
    written: Tensor
    bias: Tensor | None
    written_bias: Tensor | None
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
        before = base.weight.reshape(-1).index_select(0, positions)
        after = before + values
    else:
        before, after = merged_entries(base.weight, values, positions)
        changes, lost = _lost_changes(before, after, values)
    try:
        _write(base.weight, positions, after)
        bias, written, changes_of_bias, lost_of_bias = add_to_bias(base, bias_delta)
    except BaseException:
        _write(base.weight, positions, before)
        raise
    return MergeRecord(positions, before, after, bias, written, changes + changes_of_bias, lost + lost_of_bias)


@torch.no_grad()
def add_to_bias(base: Any, delta: Tensor | None) -> tuple[Tensor | None, Tensor | None, int, int]:
    """Add a delta to a layer's bias in place.

    Args:
        base: the layer.
        delta: `(neurons,)`, None if there is none.

    Returns:
        The original bias, the new one, and the numbers of changes and of lost changes as in `MergeRecord`.
    """
    if delta is None:
        return None, None, 0, 0
    delta = delta.view_as(base.bias)  # a norm's bias may have several dimensions
    if base.bias.dtype == delta.dtype == torch.float32:
        before = base.bias.detach().clone()
        base.bias.add_(delta)
        return before, base.bias.detach().clone(), 0, 0
    before, after = sums(base.bias.detach().clone(), delta)
    counts = _lost_changes(before, after, delta)
    base.bias.copy_(after)
    return before, after, *counts


@torch.no_grad()
def restore_entries(base: Any, record: MergeRecord) -> MergeRecord:
    """Undo a merge in place. The layer may have another device or dtype by now.

    Entries that something else has changed since the merge keep that change: what the merge added is subtracted from
    them, unless they are the originals again. All others get their originals back, bit for bit. If anything is raised,
    the layer is as it was.

    Returns:
        The record of what was overwritten. Restoring it merges again, bit for bit.
    """
    merged = present(base, record)
    weight = record.weight if record.held is not None else _without(merged.weight, record.written, record.weight)
    bias = None if record.bias is None else _without(merged.bias, record.written_bias, record.bias)
    try:
        _overwrite(base, replace(record, weight=weight, bias=bias))
    except BaseException:
        _overwrite(base, merged)
        raise
    return replace(merged, written=record.written if record.held is not None else weight, written_bias=bias)


def present(base: Any, record: MergeRecord) -> MergeRecord:
    """Return a record of what undoing a merge would overwrite now."""
    return replace(
        record,
        weight=record.weight if record.held is not None else _read(base.weight, record.positions),
        bias=None if record.bias is None else base.bias.detach().clone(),
        held=None if record.held is None else held_by(base),
    )


def changed_since(record: MergeRecord, merged: MergeRecord) -> int:
    """Return how many of the numbers that a merge wrote something else has changed since.

    Args:
        record: of the merge.
        merged: what undoing it overwrites, see `present` and `restore_entries`.
    """
    weight = 0 if record.held is not None else int((~_is_same(merged.weight, record.written)).sum())
    return weight + (0 if record.bias is None else int((~_is_same(merged.bias, record.written_bias)).sum()))


def _is_same(now: Any, written: Any) -> Tensor:
    """Return which numbers are those that were written, as a weight that was cast since then has them."""
    written = written.to(now)
    same: Tensor = (now == written) | (now.isnan() & written.isnan())
    return same


def _without(now: Any, written: Any, before: Any) -> Tensor:
    """Return the numbers from before a merge, and where others have changed them since, those without what it added.

    Numbers that are back already, as a state dict brings them, stay.
    """
    same = _is_same(now, written) | _is_same(now, before)
    if bool(same.all()):
        return before
    exact = torch.promote_types(now.dtype, torch.float32)
    now, written, before = (tensor.to(now.device, exact) for tensor in (now, written.to(now), before.to(now)))
    return torch.where(same, before, now - (written - before))


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
