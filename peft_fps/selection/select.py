"""Select the entries of every layer by score, for every granularity."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from peft_fps.selection.blocks import block_entries
from peft_fps.selection.candidate import Candidate, Selected
from peft_fps.selection.feasible import check_granularity
from peft_fps.selection.model_wide import best_of_all
from peft_fps.selection.structured import select_whole
from peft_fps.selection.topk import reversed_order, top_k, top_k_flat


def select_entries(
    candidates: Mapping[str, Candidate], granularity: str, *, block_top: float = 0.03, order: str = "top"
) -> dict[str, Selected]:
    """Select the best entries of every layer. Ties go to the earlier layer, then to the lowest index.

    Args:
        candidates: layers by module path.
        granularity: which entries compete. `"neuron"`: each neuron selects its best, the same number for every neuron,
            and the rest goes to the layer's best next candidates (FPS, arXiv 2510.27359, appendix A.1). `"layer"`: the
            best of each layer. `"model"`: the best of all layers together. `"block"`: as `"neuron"`, with the number
            per neuron that `block_entries` derives for the layer's block (TR-PTS, arXiv 2507.22872). `"row"` and
            `"column"`: complete neurons or inputs (FAR, arXiv 2205.01541; see `select_whole`).
        block_top: share of all scored weights that decides between blocks under `"block"`. Default: 0.03.
        order: whether the largest scores (`"top"`, the default) or the smallest (`"bottom"`) are the best. Under
            `"row"` and `"column"` it orders sums of scores. The number of entries of a block does not depend on it.

    Returns:
        Columns `(nnz,)` and row counts `(neurons,)` of each layer, int64, by module path.

    Raises:
        ValueError: there are fewer entries than the granularity needs (see `check_granularity`).
    """
    shapes = {name: candidate.shape for name, candidate in candidates.items()}
    check_granularity(granularity, shapes, sum(candidate.entries for candidate in candidates.values()))
    if granularity in ("row", "column"):
        return select_whole(candidates, granularity, order)
    if granularity == "block":
        numbers = block_entries(candidates, block_top)
        candidates = {name: replace(candidate, entries=numbers[name]) for name, candidate in candidates.items()}
    if order == "bottom":
        candidates = {name: _from_bottom(candidate) for name, candidate in candidates.items()}
    if granularity in ("neuron", "block"):
        return {name: select_by_neuron(candidate) for name, candidate in candidates.items()}
    if granularity == "layer":
        return {name: select_by_layer(candidate) for name, candidate in candidates.items()}
    assert granularity == "model"
    return select_by_model(candidates)


def select_by_neuron(candidate: Candidate) -> Selected:
    """Select the best ⌊K⌋ entries of every neuron, with K = entries / neurons, and then the best next candidates.

    The rest of the entries goes to the neurons whose next entry has the largest score, one each.
    """
    floor, extra = divmod(candidate.entries, candidate.shape.neurons)
    ranks = floor + 1 if extra else floor
    ranked = [top_k(scores, ranks) for scores in candidate.chunks()]
    columns = torch.cat([columns for columns, _ in ranked])
    counts = torch.full((candidate.shape.neurons,), floor, dtype=torch.int64, device=columns.device)
    if extra:
        rows = top_k_flat(torch.cat([scores[:, floor] for _, scores in ranked]), extra)
        counts[rows] += 1
        # the number of inputs marks an unused entry: it sorts behind every column and is dropped
        columns[:, floor] = torch.where(counts > floor, columns[:, floor], candidate.shape.inputs)
    columns = columns.sort(dim=1).values
    return columns[columns < candidate.shape.inputs], counts


def select_by_layer(candidate: Candidate) -> Selected:
    """Select the best entries of a layer, regardless of their neurons."""
    positions = top_k_flat(candidate.score(0, candidate.shape.neurons), candidate.entries)
    return _from_positions(positions, candidate)


def select_by_model(candidates: Mapping[str, Candidate]) -> dict[str, Selected]:
    """Select the best entries of all layers together, with one layer's scores in memory at a time."""
    total = sum(candidate.entries for candidate in candidates.values())
    return {name: _from_positions(positions, candidates[name]) for name, positions in best_of_all(candidates, total)}


def _from_bottom(candidate: Candidate) -> Candidate:
    """Return the candidate with the order of its scores reversed."""
    return replace(candidate, score=lambda first, last: reversed_order(candidate.score(first, last)))


def _from_positions(positions: Tensor, candidate: Candidate) -> Selected:
    """Split positions into columns `(nnz,)` and row counts `(neurons,)`.

    Args:
        positions: positions in the flattened `(neurons, inputs)`, `(nnz,)` int64, increasing.
        candidate: the layer.
    """
    rows = torch.div(positions, candidate.shape.inputs, rounding_mode="floor")
    return positions - rows * candidate.shape.inputs, torch.bincount(rows, minlength=candidate.shape.neurons)
