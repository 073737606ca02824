"""What a product keeps of its input for backward, and how backward gets the needed columns from it.

The gradient of the values reads the columns `structure.union` of the input, and no others. The product copies these
columns, once for all layers that read one tensor. If the graph holds the input in any case, no copy is needed.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from peft_fps.sparse.structure import Structure


@dataclass(frozen=True)
class Kept:
    """Tensors to keep for backward, and the function that returns columns of the input from them.

    Attributes:
        tensors: what autograd saves.
        columns: takes these tensors. Returns the needed columns of the input, `(tokens, used)`, or all columns,
            `(tokens, inputs)`, if all are kept.
    """

    tensors: tuple[Tensor, ...]
    columns: Callable[..., Any]


NOTHING = Kept((), tuple)
"""Keeps nothing, for values that are not trained."""


@dataclass
class Reading:
    """Copies that the readers of one tensor, for instance query, key and value projections, share.

    Attributes:
        pieces: copied columns, `(tokens, columns)` each. No column is in two pieces.
        columns: indices of the columns of each piece, `(columns,)` int64.
    """

    pieces: list[Tensor] = field(default_factory=list)
    columns: list[Tensor] = field(default_factory=list)


def keep_columns(
    x: Tensor,
    structure: Structure,
    reading: Reading,
    kept_dtype: torch.dtype | None = None,
    product_dtype: torch.dtype | None = None,
) -> Kept:
    """Copy those needed columns of `x` that no other reader of `x` has copied.

    The copies depend only on the order in which layers read the tensor. So a repeated forward (gradient checkpointing)
    keeps the same columns.

    Args:
        x: `(tokens, inputs)`.
        structure: which columns are needed.
        reading: copies of earlier readers of `x`. The function adds the new columns to it. Backward empties it.
        kept_dtype: dtype of the copies. Default: the dtype of `x`.
        product_dtype: dtype of the columns that backward gets. Default: the dtype of `x`.
    """
    if not reading.pieces:
        missing, places = structure.union, None
    else:
        missing, places = _missing_columns(structure, reading.columns)
    if missing.numel() or not reading.pieces:
        reading.pieces.append(x.index_select(1, missing).to(kept_dtype or x.dtype))
        reading.columns.append(missing)
    product_dtype = product_dtype or x.dtype

    def columns(*pieces: Tensor) -> Tensor:
        # backward frees the pieces, so a reader that comes after it has to copy all its columns
        reading.pieces.clear()
        reading.columns.clear()
        if places is None:
            return pieces[0].to(product_dtype)
        return torch.cat(pieces, 1).index_select(1, places).to(product_dtype)

    return Kept(tuple(reading.pieces), columns)


def keep_own_columns(x: Tensor, structure: Structure) -> Kept:
    """Copy the needed columns of `x` `(tokens, inputs)` for one reader. `torch.compile` can trace this function."""
    return Kept((x.index_select(1, structure.union),), lambda columns: columns)


def keep_whole(x: Tensor) -> Kept:
    """Keep `x` `(tokens, inputs)` itself. This costs nothing if the graph holds its memory in any case."""
    return Kept((x,), lambda x: x)


def _missing_columns(structure: Structure, known: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Find the needed columns that no piece has.

    Args:
        structure: which columns are needed. It caches the result.
        known: indices of the columns of each piece.

    Returns:
        Indices of the missing columns, `(missing,)` int64. And for each needed column `(used,)` int64, where it lies
        in the concatenation of all pieces, the missing columns last.
    """
    key = tuple(id(columns) for columns in known)
    cached = structure.shared.get(key)
    if cached is None:
        kept = torch.cat(known)
        location = torch.full((structure.inputs,), -1, device=kept.device)
        location[kept] = torch.arange(kept.numel(), device=kept.device)
        missing = structure.union[location[structure.union] < 0]
        location[missing] = kept.numel() + torch.arange(missing.numel(), device=kept.device)
        cached = (list(known), missing, location[structure.union])
        structure.shared.clear()  # a model reads a tensor in one order of layers, so one cached result suffices
        structure.shared[key] = cached  # not read back: another thread may clear the cache at once
    _, missing, places = cached
    return missing, places
