"""Choose the entries of every layer by score, under the three granularities."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_fps.selection.topk import top_k, top_k_flat


# Scores are formed for at most this many weights at once (16 MiB in float32) where rows can be ranked on their own.
SCORED_ELEMENTS = 1 << 22

Selected = tuple[Tensor, Tensor]
"""Columns `(nnz,)` and row counts `(neurons,)` of a layer, int64."""


@dataclass(frozen=True)
class Candidate:
    """One layer to select from.

    Attributes:
        neurons: rows of its weight seen as `(neurons, inputs)`.
        inputs: columns.
        entries: how many to select (under granularity "model" only the sum over all layers counts).
        score: returns the scores of the rows `first:last` as non-negative float32 `(last - first, inputs)`; the same
            rows give the same scores at every call.
    """

    neurons: int
    inputs: int
    entries: int
    score: Callable[[int, int], Tensor]


def select_entries(candidates: Mapping[str, Candidate], granularity: str) -> dict[str, Selected]:
    """Select the best entries of every layer; ties go to the lowest index (and the earlier layer).

    Args:
        candidates: layers by module path.
        granularity: `"neuron"`: every neuron gets the same number, and the fraction that is left goes to the layer's
            best next candidates (FPS, appendix A.1). `"layer"`: the best of the layer wherever they lie. `"model"`:
            the best of all layers together.
    """
    if granularity == "neuron":
        return {name: select_by_neuron(candidate) for name, candidate in candidates.items()}
    if granularity == "layer":
        return {name: select_by_layer(candidate) for name, candidate in candidates.items()}
    assert granularity == "model"
    return select_by_model(candidates)


def select_by_neuron(candidate: Candidate) -> Selected:
    """The top ⌊K⌋ of every neuron, K = entries / neurons, and the best next candidates, at most one per neuron."""
    floor, extra = divmod(candidate.entries, candidate.neurons)
    ranks = floor + 1 if extra else floor
    step = max(SCORED_ELEMENTS // max(candidate.inputs, 1), 1)
    chunks = range(0, candidate.neurons, step)
    ranked = [top_k(candidate.score(first, min(first + step, candidate.neurons)), ranks) for first in chunks]
    columns = torch.cat([columns for columns, _ in ranked])
    counts = torch.full((candidate.neurons,), floor, dtype=torch.int64, device=columns.device)
    if extra:
        rows = top_k_flat(torch.cat([scores[:, floor] for _, scores in ranked]), extra)
        counts[rows] += 1
        # an unused last place sorts behind every column and is dropped
        columns[:, floor] = torch.where(counts > floor, columns[:, floor], candidate.inputs)
    columns = columns.sort(dim=1).values
    return columns[columns < candidate.inputs], counts


def select_by_layer(candidate: Candidate) -> Selected:
    """The best entries of the layer, whatever their neuron."""
    positions = top_k_flat(candidate.score(0, candidate.neurons), candidate.entries)
    return _from_positions(positions, candidate)


def select_by_model(candidates: Mapping[str, Candidate]) -> dict[str, Selected]:
    """The best entries of all layers together, with one layer's scores in memory at a time.

    A first pass counts scores by their leading bits (the bit patterns of non-negative floats are ordered like the
    floats), which gives the bin that holds the last score to be selected. A second pass takes everything above that
    bin, and the scores within it are ranked exactly.
    """
    total = sum(candidate.entries for candidate in candidates.values())
    histogram = sum(torch.bincount(_bins(c.score(0, c.neurons)), minlength=_BINS).cpu() for c in candidates.values())
    assert isinstance(histogram, Tensor)
    at_least = histogram.flip(0).cumsum(0).flip(0)
    last_bin = int((at_least >= total).nonzero()[-1]) if total else _BINS

    above, level, level_scores = [], [], []
    for candidate in candidates.values():
        scores = candidate.score(0, candidate.neurons).reshape(-1)
        bins = _bins(scores)
        above.append((bins > last_bin).nonzero()[:, 0])
        level.append((bins == last_bin).nonzero()[:, 0])
        level_scores.append(scores[level[-1]].cpu())
    kept = torch.zeros(sum(part.numel() for part in level), dtype=torch.bool)
    kept[top_k_flat(torch.cat(level_scores), total - sum(part.numel() for part in above))] = True
    within = kept.split([part.numel() for part in level])
    return {
        name: _from_positions(torch.cat([above[i], level[i][within[i].to(level[i].device)]]).sort().values, candidate)
        for i, (name, candidate) in enumerate(candidates.items())
    }


_BINS = 1 << 16


def _bins(scores: Tensor) -> Tensor:
    """Leading 16 bits of non-negative float32 scores, as integers in the order of the scores."""
    return scores.reshape(-1).view(torch.int32) >> 15


def _from_positions(positions: Tensor, candidate: Candidate) -> Selected:
    """Split sorted flat positions into columns and row counts."""
    rows = torch.div(positions, max(candidate.inputs, 1), rounding_mode="floor")
    return positions - rows * candidate.inputs, torch.bincount(rows, minlength=candidate.neurons)
