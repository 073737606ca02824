"""Layers to select from, and selections as plain lists."""

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from peft_fps.selection import Candidate, LayerShape, select_entries


Layers = dict[str, tuple[list[list[float]], int]]
"""Scores and number of entries by name."""

CHUNK = "peft_fps.selection.candidate.SCORED_ELEMENTS"

SCORE = st.sampled_from([0.0, 0.25, 0.5, 0.50390625, 1.0, 1.0078125, 2.0, 1e-30])


@st.composite
def layers(draw: st.DrawFn, scores_from: st.SearchStrategy[float] = SCORE) -> Layers:
    """Scores and entries of some layers, by name."""
    result = {}
    for i in range(draw(st.integers(1, 3))):
        neurons, inputs = draw(st.integers(1, 5)), draw(st.integers(1, 6))
        row = st.lists(scores_from, min_size=inputs, max_size=inputs)
        scores = draw(st.lists(row, min_size=neurons, max_size=neurons))
        result[f"layer{i}"] = (scores, draw(st.integers(0, neurons * inputs)))
    return result


def candidate(scores: list[list[float]] | Tensor, entries: int) -> Candidate:
    tensor = torch.as_tensor(scores, dtype=torch.float32)
    return Candidate(LayerShape(tensor.shape[0], tensor.shape[1]), entries, lambda first, last: tensor[first:last])


def as_rows(columns: Tensor, counts: Tensor) -> list[list[int]]:
    assert (columns.dtype, counts.dtype) == (torch.int64, torch.int64)
    return [part.tolist() for part in columns.split(counts.tolist())]


def selected(given_layers: Layers, granularity: str, **options: Any) -> dict[str, list[list[int]]]:
    candidates = {name: candidate(scores, entries) for name, (scores, entries) in given_layers.items()}
    found = select_entries(candidates, granularity, **options)
    assert list(found) == list(given_layers)
    return {name: as_rows(*pair) for name, pair in found.items()}
