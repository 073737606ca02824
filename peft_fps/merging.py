"""Fold a sparse change into a layer's weight and take it out again, bit for bit."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peft_fps.sparse import Structure, merged_entries


@dataclass(frozen=True)
class MergeRecord:
    """The originals of everything a merge overwrote, and how much of the change rounding swallowed.

    Attributes:
        positions: `(nnz,)` int64 positions in the flattened weight.
        weight: `(nnz,)` original entries.
        bias: `(neurons,)` original bias, None if the adapter has no bias delta here.
        changes: number of changes that are not zero, bias deltas included.
        lost: number of these that left the stored number as it was.
        finite: whether everything written is finite.
    """

    positions: Tensor
    weight: Tensor
    bias: Tensor | None
    changes: int
    lost: int
    finite: bool


def merge_entries(base: Any, structure: Structure, values: Tensor, bias_delta: Tensor | None) -> MergeRecord:
    """Add `values` `(nnz,)` and `bias_delta` `(neurons,)` to the layer in place; sums in float32, rounded once."""
    before, after = merged_entries(base.weight, values, structure.positions)
    _write(base.weight, structure.positions, after)
    stored, wanted, written, bias = [before == after], [values != 0], [after], None
    if bias_delta is not None:
        everywhere = torch.arange(bias_delta.numel(), device=bias_delta.device)
        bias, bias_after = merged_entries(base.bias, bias_delta, everywhere)
        _write(base.bias, everywhere, bias_after)
        stored.append(bias == bias_after)
        wanted.append(bias_delta != 0)
        written.append(bias_after)
    changed = torch.cat(wanted)
    lost = int((torch.cat(stored) & changed).sum())
    finite = all(bool(torch.isfinite(tensor).all()) for tensor in written)
    return MergeRecord(structure.positions, before, bias, int(changed.sum()), lost, finite)


def restore_entries(base: Any, record: MergeRecord) -> None:
    """Undo `merge_entries` in place."""
    _write(base.weight, record.positions, record.weight)
    if record.bias is not None:
        _write(base.bias, torch.arange(record.bias.numel(), device=record.bias.device), record.bias)


def trial_copy(base: Any) -> Any:
    """Return a layer that computes as `base` does, hooks included, with copies of its weight and bias."""
    trial = copy.copy(base)
    copies = {name: p if p is None else p.detach().clone() for name, p in base._parameters.items()}
    trial.__dict__["_parameters"] = copies
    return trial


def unmerged_copy(base: Any, records: Iterable[MergeRecord]) -> Any:
    """Return a copy of the layer as it was before the merges `records`, latest merge first; `base` stays untouched."""
    trial = trial_copy(base)
    for record in records:
        restore_entries(trial, record)
    return trial


@torch.no_grad()
def _write(target: Tensor, positions: Tensor, entries: Tensor) -> None:
    """Write in place, through autograd's eyes, so that a backward that still needs the old numbers is refused."""
    if target.is_contiguous():
        target.view(-1).index_copy_(0, positions, entries)
    else:  # channels-last convolutions, transposed views
        target[torch.unravel_index(positions, target.shape)] = entries
