"""What is selected from: a layer's size, its number of entries, and a function that scores its weights."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_fps.selection.budget_allocation import LayerShape


# Scores are formed for at most this many weights at once (16 MiB in float32) where rows can be ranked on their own.
SCORED_ELEMENTS = 1 << 22

Selected = tuple[Tensor, Tensor]
"""Columns `(nnz,)` and row counts `(neurons,)` of a layer, int64."""


@dataclass(frozen=True)
class Candidate:
    """One layer to select from.

    Attributes:
        shape: of its weight, `(neurons, inputs)`.
        entries: how many to select (under granularity "model" and "block" only the sum over all layers counts; under
            "row" and "column" what fills no whole neuron or input goes to another layer).
        score: returns the scores of the rows `first:last` as non-negative float32 `(last - first, inputs)`; the same
            rows give the same scores at every call.
    """

    shape: LayerShape
    entries: int
    score: Callable[[int, int], Tensor]

    def chunks(self) -> Iterator[Tensor]:
        """Score all rows, some at a time: yields `(rows, inputs)`."""
        step = max(SCORED_ELEMENTS // self.shape.inputs, 1)
        for first in range(0, self.shape.neurons, step):
            yield self.score(first, min(first + step, self.shape.neurons))

    def nothing(self) -> Selected:
        """The selection of no entry; the layer is not scored for it."""
        counts = torch.zeros(self.shape.neurons, dtype=torch.int64, device="cpu")
        return counts[:0], counts
