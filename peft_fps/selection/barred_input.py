"""Selection from a layer with one input that gets no entry, such as the padding token of an embedding."""

from dataclasses import replace

import torch
from torch import Tensor

from peft_fps.selection.budget_allocation import LayerShape
from peft_fps.selection.candidate import Candidate, Selected


def without_input(candidate: Candidate, barred: int | None) -> Candidate:
    """Return the candidate without an input. Its other inputs move up.

    Args:
        candidate: a layer with all its inputs.
        barred: index of the input. None leaves the candidate as it is.
    """
    if barred is None:
        return candidate

    def score(first: int, last: int) -> Tensor:
        scores = candidate.score(first, last)
        return torch.cat([scores[:, :barred], scores[:, barred + 1 :]], dim=1)

    shape = LayerShape(candidate.shape.neurons, candidate.shape.inputs - 1)
    return replace(candidate, shape=shape, score=score)


def with_input(selected: Selected, barred: int | None) -> Selected:
    """Return columns and row counts of a layer with all its inputs, from those of `without_input`."""
    columns, row_counts = selected
    return (columns, row_counts) if barred is None else (columns + (columns >= barred).to(columns.dtype), row_counts)
