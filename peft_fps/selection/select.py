"""Choose the entries of every layer by score, under all granularities."""

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
    """Select the best entries of every layer; ties go to the lowest index (and the earlier layer).

    Args:
        candidates: layers by module path. One without inputs is passed through: nothing is selected of it.
        granularity: `"neuron"`: every neuron gets the same number, and the fraction that is left goes to the layer's
            best next candidates (FPS, appendix A.1). `"layer"`: the best of the layer wherever they lie. `"model"`:
            the best of all layers together. `"block"`: as `"neuron"`, with a number per neuron that `block_entries`
            derives from the scores of the layer's block (TR-PTS). `"row"`, `"column"`: whole neurons or whole inputs
            (FAR, see `select_whole`).
        block_top: share of all scored weights that decides between blocks; only under `"block"`.
        order: `"top"`: the largest scores are the best; `"bottom"`: the smallest. The scores are the same. Sums over a
            neuron or an input are formed first and then ranked from the bottom, and a block's number of entries does
            not depend on the order: only which weights it takes does.

    Raises:
        ValueError: there are fewer entries than the granularity needs (see `check_granularity`).
    """
    scored = {name: candidate for name, candidate in candidates.items() if candidate.inputs}
    check_granularity(granularity, scored, sum(candidate.entries for candidate in candidates.values()))
    if granularity == "block":
        numbers = block_entries(scored, block_top)
        scored = {name: replace(candidate, entries=numbers[name]) for name, candidate in scored.items()}
    if granularity in ("row", "column"):
        selected = select_whole(scored, granularity, order)
    else:
        ranked = {name: _from_bottom(c) for name, c in scored.items()} if order == "bottom" else scored
        if granularity in ("neuron", "block"):
            selected = {name: select_by_neuron(candidate) for name, candidate in ranked.items()}
        elif granularity == "layer":
            selected = {name: select_by_layer(candidate) for name, candidate in ranked.items()}
        else:
            assert granularity == "model"
            selected = select_by_model(ranked)
    return {name: selected.get(name) or candidate.nothing() for name, candidate in candidates.items()}


def select_by_neuron(candidate: Candidate) -> Selected:
    """The top ⌊K⌋ of every neuron, K = entries / neurons, and the best next candidates, at most one per neuron."""
    floor, extra = divmod(candidate.entries, candidate.neurons)
    ranks = floor + 1 if extra else floor
    ranked = [top_k(scores, ranks) for scores in candidate.chunks()]
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
    """The best entries of all layers together, with one layer's scores in memory at a time."""
    total = sum(candidate.entries for candidate in candidates.values())
    return {name: _from_positions(positions, candidates[name]) for name, positions in best_of_all(candidates, total)}


def _from_bottom(candidate: Candidate) -> Candidate:
    return replace(candidate, score=lambda first, last: reversed_order(candidate.score(first, last)))


def _from_positions(positions: Tensor, candidate: Candidate) -> Selected:
    """Split sorted flat positions into columns and row counts."""
    rows = torch.div(positions, candidate.inputs, rounding_mode="floor")
    return positions - rows * candidate.inputs, torch.bincount(rows, minlength=candidate.neurons)
