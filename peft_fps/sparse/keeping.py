"""What a product keeps of its input for backward, and how the needed columns come back from it.

The gradient of the values reads the columns `structure.union` of the input, and nothing else of it. They are copied
out, once for all readers of one tensor, or come from a tensor that the graph holds in any case.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from peft_fps.sparse.structure import Structure


@dataclass(frozen=True)
class Kept:
    """Tensors to keep for backward, and the function that makes columns of the input of them again.

    It returns the needed columns `(tokens, used)`, or all of them, `(tokens, inputs)`, if they are there anyway.
    """

    tensors: tuple[Tensor, ...]
    columns: Callable[..., Any]


NOTHING = Kept((), tuple)
"""For values that are not trained."""


@dataclass
class Reading:
    """What the readers of one tensor have kept of it so far.

    Attributes:
        pieces: `(tokens, columns)` each; no column is in two of them.
        columns: `(columns,)` int64, the numbers of the columns of each piece.
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
    """Copy those needed columns of `x` that no reader has copied yet; a later reader adds only what it lacks.

    So what is kept depends on who reads a tensor before whom, and on nothing that is learned on the way: a forward
    that is repeated (gradient checkpointing) keeps the same again.

    Args:
        x: `(tokens, inputs)`.
        structure: says which columns are needed.
        reading: what earlier readers of the same tensor have kept; gets the new columns.
        kept_dtype: of the copies, that of `x` if None.
        product_dtype: of the columns that are given back, that of `x` if None.
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
        reading.pieces.clear()  # who reads the tensor after backward has begun starts anew
        reading.columns.clear()
        if places is None:
            return pieces[0].to(product_dtype)
        return torch.cat(pieces, 1).index_select(1, places).to(product_dtype)

    return Kept(tuple(reading.pieces), columns)


def keep_own_columns(x: Tensor, structure: Structure) -> Kept:
    """Copy the needed columns of `x` `(tokens, inputs)` and share them with no one; `torch.compile` can trace it."""
    return Kept((x.index_select(1, structure.union),), lambda columns: columns)


def keep_whole(x: Tensor) -> Kept:
    """Keep `x` `(tokens, inputs)` itself, which costs nothing where the graph holds its memory in any case."""
    return Kept((x,), lambda x: x)


def _missing_columns(structure: Structure, known: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the needed columns that are not known, and where each needed one lies in all pieces put side by side."""
    key = tuple(id(columns) for columns in known)
    found = structure.shared.get(key)
    if found is None:
        held = torch.cat(known)
        place = torch.full((structure.inputs,), -1, device=held.device)
        place[held] = torch.arange(held.numel(), device=held.device)
        missing = structure.union[place[structure.union] < 0]
        place[missing] = held.numel() + torch.arange(missing.numel(), device=held.device)
        found = (list(known), missing, place[structure.union])
        structure.shared.clear()  # one constellation of readers is what a model has
        structure.shared[key] = found  # which another thread may take out again at once
    _, missing, places = found
    return missing, places
