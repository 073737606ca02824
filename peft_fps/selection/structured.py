"""Selection of complete neurons or complete inputs, the rows or columns of a weight (FAR, arXiv 2205.01541)."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from peft_fps.selection.candidate import Candidate, Selected
from peft_fps.selection.topk import top_k_flat


def select_whole(candidates: Mapping[str, Candidate], granularity: str, order: str) -> dict[str, Selected]:
    """Select complete neurons by the sum of scores over their inputs, or complete inputs by the sum over neurons.

    If scores are absolute changes of weights, this sum is FAR's score of a node (arXiv 2205.01541). `whole_numbers`
    says how many neurons or inputs a layer gets. Ties go to the lowest index.

    Args:
        candidates: layers by module path.
        granularity: `"row"` for neurons, `"column"` for inputs.
        order: `"top"` for the largest sums, `"bottom"` for the smallest.

    Returns:
        Columns `(nnz,)` and row counts `(neurons,)` of each layer, int64, by module path.
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
    """Return how many complete neurons (or inputs) every layer gets.

    A layer gets as many as its entries and the rest of the layers before it fill. Its own rest goes to the next layer.
    A second round offers the rest of the last layer to all layers, from the first on. So the sum never exceeds the
    entries, and the final rest fills no further neuron (or input) of any layer.

    Args:
        entries: number of entries of every layer.
        sizes: for every layer, the entries of one neuron (or input), and the number of its neurons (or inputs).
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
    """Return the sum of scores of each neuron `(neurons,)`, or else of each input `(inputs,)`.

    The sums are float64, or float32 on Apple's GPUs.
    """
    sums = [_sum(scores, 1 if by_row else 0) for scores in candidate.chunks()]
    return torch.cat(sums) if by_row else torch.stack(sums).sum(0)


def _sum(scores: Tensor, dim: int) -> Tensor:
    """Sum over a dimension in float64, or in float32 on Apple's GPUs, which have no float64."""
    return scores.sum(dim, dtype=torch.float32 if scores.device.type == "mps" else torch.float64)
