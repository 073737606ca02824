"""Combine sparse changes of one weight into one: tensors in, tensors out.

The rules are those of PEFT's `merge_utils` on dense changes. Here each change is given by its own entries alone, and
every sum is formed over the union of the entries.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peft_fps.selection.calibration_record import CalibrationRecord
from peft_fps.sparse import Structure, unite_structures


TYPES = ("linear", "cat", "ties", "dare_linear", "dare_ties", "magnitude_prune")
UNPRUNED = ("linear", "cat")
SIGNED = ("ties", "dare_ties")
MAJORITIES = ("total", "frequency")


@dataclass(frozen=True)
class Combination:
    """What is combined, and how; see `FPSModel.add_weighted_adapter`.

    Raises:
        TypeError, ValueError: names the argument, what was found and what is expected.
    """

    adapters: Sequence[str]
    weights: Sequence[float]
    combination_type: str = "linear"
    density: float | None = None
    majority_sign_method: str = "total"

    def __post_init__(self) -> None:
        names: Any = self.adapters
        if not isinstance(names, (list, tuple)) or any(not isinstance(name, str) for name in names):
            raise TypeError(f"adapters is {names!r}, expected a list of adapter names.")
        if not names:
            raise ValueError("adapters is empty, expected at least one name.")
        _check_weights(self.weights, len(names))
        for name, allowed in (("combination_type", TYPES), ("majority_sign_method", MAJORITIES)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, expected one of {', '.join(map(repr, allowed))}."
                )
        density: Any = self.density
        if density is None:
            if self.combination_type in UNPRUNED:
                return
            raise ValueError(
                f"density is None, expected a number above 0 and at most 1 with combination_type="
                f"{self.combination_type!r}: the share of an adapter's entries that pruning keeps."
            )
        if isinstance(density, bool) or not isinstance(density, (int, float)):
            raise TypeError(f"density is {density!r} of type {type(density).__name__}, expected a number.")
        if not 0 < density <= 1:
            raise ValueError(f"density is {density}, expected a number above 0 and at most 1.")

    def record(self) -> CalibrationRecord:
        """Return what was combined."""
        return CalibrationRecord(
            combination=self.combination_type,
            adapters=tuple(self.adapters),
            weights=tuple(float(weight) for weight in self.weights),
            density=None if self.combination_type in UNPRUNED else float(self.density or 0),
            majority_sign_method=self.majority_sign_method if self.combination_type in SIGNED else None,
        )


def united_entries(structures: Sequence[Structure]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return the union of several selections of one weight.

    Returns:
        Columns `(united,)` and row counts `(neurons,)` of the union, both int32, and for each selection the places of
        its entries among the united ones, `(nnz,)` int64.
    """
    united, places = unite_structures(list(structures))
    columns = united.union.index_select(0, united.union_positions)
    row_counts = united.row_starts.diff()
    own = places.split([structure.positions.numel() for structure in structures])
    return columns.to(torch.int32), row_counts.to(torch.int32), list(own)


def combine(changes: Sequence[Tensor], places: Sequence[Tensor], size: int, how: Combination) -> Tensor:
    """Return the combination of sparse changes at all united entries.

    Args:
        changes: `(nnz,)` each, one per adapter, which may differ in length.
        places: `(nnz,)` int64 each, where these lie among the united entries, without repetition.
        size: number of united entries.
        how: weights and rule.

    Returns:
        `(size,)` in float32, or float64 where a change has it.
    """
    dtype = torch.float32
    for change in changes:
        dtype = torch.promote_types(dtype, change.dtype)
    laid_out = changes[0].new_zeros(len(changes), size, dtype=dtype)
    for row, change, place in zip(laid_out, changes, places, strict=True):
        row.index_copy_(0, place, _pruned(change.to(dtype), how))
    weighted = laid_out * laid_out.new_tensor([float(weight) for weight in how.weights])[:, None]
    if how.combination_type not in SIGNED:
        return weighted.sum(0)
    # as PEFT has it, weights have no say in the election, and zero counts as positive
    votes = laid_out if how.majority_sign_method == "total" else laid_out.sign()
    agreeing = laid_out.sign() == torch.where(votes.sum(0) >= 0, 1, -1)
    return (weighted * agreeing).sum(0) / agreeing.sum(0).clamp(min=1)


def _pruned(change: Tensor, how: Combination) -> Tensor:
    """Set the changes that pruning drops to zero."""
    density = how.density
    if how.combination_type in UNPRUNED or density is None or density == 1:
        return change
    if how.combination_type.startswith("dare"):
        return change * torch.bernoulli(torch.full_like(change, density)) / density
    largest = change.abs().topk(int(density * change.numel())).indices
    return torch.zeros_like(change).index_copy(0, largest, change[largest])


def _check_weights(weights: Any, count: int) -> None:
    """Raise TypeError or ValueError unless the weights are a list of `count` finite numbers."""
    if not isinstance(weights, (list, tuple)):
        raise TypeError(f"weights is {weights!r}, expected a list of numbers.")
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise TypeError(f"weights holds {weight!r} of type {type(weight).__name__}, expected numbers.")
        if not math.isfinite(weight):
            raise ValueError(f"weights holds {weight}, expected finite numbers.")
    if len(weights) != count:
        raise ValueError(f"weights has {len(weights)} numbers, expected one for each of the {count} adapters.")
