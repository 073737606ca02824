"""Whole neurons or whole inputs, the rows or columns of a weight (FAR, arXiv 2205.01541)."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from peft_fps.selection.candidate import Candidate, Selected
from peft_fps.selection.topk import top_k_flat


def select_whole(candidates: Mapping[str, Candidate], granularity: str, order: str) -> dict[str, Selected]:
    """Select whole neurons by the sum of scores over their inputs, or whole inputs by the sum over neurons.

    With the scores |change of a weight|, that sum is FAR's score of a node. How many a layer gets says
    `whole_numbers`. Ties go to the lowest index.

    Args:
        candidates: layers by module path.
        granularity: `"row"`: neurons; `"column"`: inputs.
        order: `"top"`: the largest sums; `"bottom"`: the smallest.
    """
    by_row = granularity == "row"
    shapes = [candidate.shape for candidate in candidates.values()]
    sizes = [(shape.inputs, shape.neurons) if by_row else (shape.neurons, shape.inputs) for shape in shapes]
    numbers = whole_numbers([c.entries for c in candidates.values()], sizes)
    selected = {}
    for (name, candidate), number in zip(candidates.items(), numbers, strict=True):
        if not number:
            selected[name] = candidate.nothing()
            continue
        sums = _sums(candidate, by_row)
        best = top_k_flat(sums if order == "top" else -sums, number)
        if by_row:
            counts = torch.zeros(candidate.shape.neurons, dtype=torch.int64, device=best.device)
            counts[best] = candidate.shape.inputs
            selected[name] = torch.arange(candidate.shape.inputs, device=best.device).repeat(number), counts
        else:
            counts = torch.full((candidate.shape.neurons,), number, dtype=torch.int64, device=best.device)
            selected[name] = best.repeat(candidate.shape.neurons), counts
    return selected


def whole_numbers(entries: Sequence[int], sizes: Sequence[tuple[int, int]]) -> list[int]:
    """Return how many whole neurons (or inputs) every layer gets.

    A layer gets as many as fit into its entries and what earlier layers left over, and leaves the rest to the next.
    What the last layer leaves is offered to all layers once more, from the first on. So the total is never exceeded,
    and what is not used up would fill no further neuron of any layer.

    Args:
        entries: of every layer.
        sizes: the entries of one neuron (or input) of every layer, and how many of them it has.
    """
    numbers, left = [0] * len(sizes), 0
    for offered in (entries, [0] * len(sizes)):
        for i, (size, count) in enumerate(sizes):
            left += offered[i]
            more = min(left // size, count - numbers[i])
            numbers[i] += more
            left -= more * size
    return numbers


def _sums(candidate: Candidate, by_row: bool) -> Tensor:
    """Sums of scores over every row `(neurons,)` or column `(inputs,)`, in float64 where the device has it."""
    sums = [_sum(scores, 1 if by_row else 0) for scores in candidate.chunks()]
    return torch.cat(sums) if by_row else torch.stack(sums).sum(0)


def _sum(scores: Tensor, dim: int) -> Tensor:
    return scores.sum(dim, dtype=torch.float32 if scores.device.type == "mps" else torch.float64)
