"""Fold a sparse change into a layer's weight and take it out again, bit for bit."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from peft_fps.quantised import dense_weight, held_by, put, quantisation
from peft_fps.sparse import Structure, merged_entries, sums


@dataclass(frozen=True)
class MergeRecord:
    """The originals of everything a merge overwrote, and how much of the change rounding swallowed.

    Attributes:
        positions: `(nnz,)` positions in the flattened weight.
        weight: `(nnz,)` original entries.
        bias: `(neurons,)` original bias, None if the adapter has no bias delta here.
        changes: number of changes that are not zero, bias deltas included; counted only where the weight has less
            precision than the sum, 0 elsewhere.
        lost: number of these that left the stored number as it was; of a quantised weight, that moved it by less than
            half of the change.
        held: what held a quantised weight, whose entries cannot be restored one by one; None for other weights, and
            `positions` and `weight` are empty otherwise.
    """

    positions: Tensor
    weight: Tensor
    bias: Tensor | None
    changes: int
    lost: int
    held: Mapping[str, Any] | None = None


@torch.no_grad()
def merge_entries(base: Any, structure: Structure, values: Tensor, bias_delta: Tensor | None) -> MergeRecord:
    """Add `values` `(nnz,)` and `bias_delta` `(neurons,)` to the layer in place; sums in float32, rounded once.

    Whatever is raised on the way, the layer is as it was.
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
            changes, lost = _swallowed(before, after, values)
        bias, changes_of_bias, lost_of_bias = add_to_bias(base, bias_delta)
    except BaseException:
        _write(base.weight, positions, before)
        raise
    return MergeRecord(positions, before, bias, changes + changes_of_bias, lost + lost_of_bias)


@torch.no_grad()
def add_to_bias(base: Any, delta: Tensor | None) -> tuple[Tensor | None, int, int]:
    """Add `(neurons,)` to the layer's bias in place; None adds nothing.

    Returns:
        The original bias, and the numbers of changes and of lost ones as in `MergeRecord`.
    """
    if delta is None:
        return None, 0, 0
    delta = delta.view_as(base.bias)  # a norm's bias may have several dimensions
    if base.bias.dtype == delta.dtype == torch.float32:
        before = base.bias.detach().clone()
        base.bias.add_(delta)
        return before, 0, 0
    before, after = sums(base.bias.detach().clone(), delta)
    swallowed = _swallowed(before, after, delta)
    base.bias.copy_(after)
    return before, *swallowed


@torch.no_grad()
def restore_entries(base: Any, record: MergeRecord) -> MergeRecord:
    """Undo a merge in place, wherever and in whatever dtype the layer is by now.

    Returns:
        What was overwritten: restoring that does the merge again, bit for bit. If anything is raised, the layer is as
        it was.
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
    if record.held is None:
        _write(base.weight, record.positions, record.weight)
    else:
        put(base, record.held)
    if record.bias is not None:
        base.bias.copy_(record.bias)


def is_finite(base: Any, record: MergeRecord) -> bool:
    """Whether everything that the merge wrote into the layer is finite."""
    written = [_read(base.weight, record.positions) if record.held is None else dense_weight(base)]
    if record.bias is not None:
        written.append(base.bias.detach())
    return all(bool(torch.isfinite(tensor).all()) for tensor in written)


def _swallowed(before: Tensor, after: Tensor, change: Tensor) -> tuple[int, int]:
    """Return how many changes were not zero, and how many of these rounding swallowed; 0, 0 for full precision."""
    if before.dtype.itemsize >= torch.promote_types(change.dtype, torch.float32).itemsize:
        return 0, 0
    wanted = change != 0
    return int(wanted.sum()), int((wanted & (before == after)).sum())


def trial_copy(base: Any) -> Any:
    """Return a layer that computes as `base` does, hooks included, with copies of its weight and bias.

    A quantised weight is shared, since merging replaces it as a whole.

    A forward put over the layer's own, as accelerate's hooks are, computes with the copies if it is a method bound to
    the layer, or a `functools.partial` whose first argument is the layer. A closure goes on reading the layer itself.
    """
    trial = copy.copy(base)
    trial.__dict__.update({name: _rebound(held, base, trial) for name, held in vars(trial).items()})
    kind = quantisation(base)
    shared = None if kind is None else kind.weight
    trial.__dict__["_parameters"] = {
        name: p if p is None or name == shared else p.detach().clone() for name, p in base._parameters.items()
    }
    if kind is not None and "bias" in vars(base) and base.bias is not None:  # HQQ's is no parameter
        trial.bias = base.bias.detach().clone()
    return trial


def unmerged_copy(base: Any, records: Iterable[MergeRecord]) -> Any:
    """Return a copy of the layer as it was before the merges `records`, latest merge first; `base` stays untouched."""
    trial = trial_copy(base)
    for record in records:
        restore_entries(trial, record)
    return trial


def _rebound(held: Any, base: Any, trial: Any) -> Any:
    """Bind a method or a partial to `trial` if it is bound to `base`; anything else is returned as it is."""
    if isinstance(held, MethodType) and held.__self__ is base:
        return MethodType(held.__func__, trial)
    if isinstance(held, partial) and held.args and held.args[0] is base:
        return partial(held.func, trial, *held.args[1:], **held.keywords)
    return held


def _read(source: Tensor, positions: Tensor) -> Tensor:
    return source.detach().reshape(-1).index_select(0, positions.to(source.device))


def _write(target: Tensor, positions: Tensor, entries: Tensor) -> None:
    """Write in place, through autograd's eyes, so that a backward that still needs the old numbers is refused."""
    # a model may have been moved, or cast, while it was merged
    positions, entries = positions.to(target.device, torch.int64), entries.to(target)
    if target.is_contiguous():
        target.view(-1).index_copy_(0, positions, entries)
    else:  # channels-last convolutions, transposed views
        target[torch.unravel_index(positions, target.shape)] = entries
