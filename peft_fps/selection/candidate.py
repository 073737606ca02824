"""A layer to select entries from: its shape, its number of entries, and a function that scores its weights."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_fps.selection.budget_allocation import LayerShape


# At most this many weights are scored at once (16 MiB in float32) where rows can be ranked independently.
SCORED_ELEMENTS = 1 << 22

Selected = tuple[Tensor, Tensor]
"""Columns `(nnz,)` and row counts `(neurons,)` of a layer, int64."""


@dataclass(frozen=True)
class Candidate:
    """One layer to select from.

    Attributes:
        shape: shape of its weight, `(neurons, inputs)`.
        entries: number of entries to select. Under granularity `"model"` and `"block"` only the sum over all layers
            counts. Under `"row"` and `"column"` entries that fill no complete neuron or input go to another layer.
        score: returns the scores of the neurons `first:last`, `(last - first, inputs)` float32, not negative. The same
            neurons have the same scores at every call.
    """

    shape: LayerShape
    entries: int
    score: Callable[[int, int], Tensor]

    def chunks(self) -> Iterator[Tensor]:
        """Score all neurons, a run of them at a time.

        Yields:
            Scores of the next run of neurons, `(rows, inputs)` float32.
        """
        step = max(SCORED_ELEMENTS // self.shape.inputs, 1)
        for first in range(0, self.shape.neurons, step):
            yield self.score(first, min(first + step, self.shape.neurons))

    def nothing(self) -> Selected:
        """Return a selection without entries. It takes no scores."""
        counts = torch.zeros(self.shape.neurons, dtype=torch.int64, device="cpu")
        return counts[:0], counts
