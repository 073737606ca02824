"""The three granularities against sorting everything."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from peft_fps.selection import Candidate, select, select_entries
from tests.helpers import normal
from tests.selection import naive


SCORE = st.sampled_from([0.0, 0.25, 0.5, 0.50390625, 1.0, 1.0078125, 2.0, 1e-30])


@st.composite
def layers(draw: st.DrawFn, min_layers: int = 1) -> dict[str, tuple[list[list[float]], int]]:
    """Scores and entries of some layers, by name."""
    result = {}
    for i in range(draw(st.integers(min_layers, 3))):
        neurons, inputs = draw(st.integers(1, 5)), draw(st.integers(1, 6))
        row = st.lists(SCORE, min_size=inputs, max_size=inputs)
        scores = draw(st.lists(row, min_size=neurons, max_size=neurons))
        result[f"layer{i}"] = (scores, draw(st.integers(0, neurons * inputs)))
    return result


def candidate(scores: list[list[float]] | Tensor, entries: int) -> Candidate:
    tensor = torch.as_tensor(scores, dtype=torch.float32)
    return Candidate(tensor.shape[0], tensor.shape[1], entries, lambda first, last: tensor[first:last])


def as_rows(columns: Tensor, counts: Tensor) -> list[list[int]]:
    assert (columns.dtype, counts.dtype) == (torch.int64, torch.int64)
    return [part.tolist() for part in columns.split(counts.tolist())]


def selected(given_layers: dict[str, tuple[list[list[float]], int]], granularity: str) -> dict[str, list[list[int]]]:
    candidates = {name: candidate(scores, entries) for name, (scores, entries) in given_layers.items()}
    found = select_entries(candidates, granularity)
    assert list(found) == list(given_layers)
    return {name: as_rows(*pair) for name, pair in found.items()}


@given(layers(), st.sampled_from([1, 5, 1 << 22]))
def test_by_neuron(given_layers: dict[str, tuple[list[list[float]], int]], scored_elements: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select, "SCORED_ELEMENTS", scored_elements)
        found = selected(given_layers, "neuron")
    for name, (scores, entries) in given_layers.items():
        assert found[name] == naive.by_neuron(scores, entries)
        k = entries / len(scores)
        assert {len(row) for row in found[name]} <= {int(k), int(-(-k // 1))}
        assert sum(map(len, found[name])) == entries


@given(layers())
def test_by_layer(given_layers: dict[str, tuple[list[list[float]], int]]):
    found = selected(given_layers, "layer")
    for name, (scores, entries) in given_layers.items():
        assert found[name] == naive.by_layer(scores, entries)


@given(layers())
def test_by_model(given_layers: dict[str, tuple[list[list[float]], int]]):
    found = selected(given_layers, "model")
    total = sum(entries for _, entries in given_layers.values())
    assert found == naive.by_model({name: scores for name, (scores, _) in given_layers.items()}, total)
    assert sum(len(row) for rows in found.values() for row in rows) == total


@pytest.mark.parametrize("total", [0, 1, 500, 2000, 4999, 5000])
def test_by_model_of_real_scores_is_exact_to_the_entry(total: int):
    scores = {"a": normal(50, 60).abs(), "b": 1e-3 * normal(40, 50, seed=1).abs()}
    given_layers = {"a": (scores["a"].tolist(), total), "b": (scores["b"].tolist(), 0)}
    found = selected(given_layers, "model")
    assert found == naive.by_model({name: tensor.tolist() for name, tensor in scores.items()}, total)


@pytest.mark.parametrize("granularity", ["neuron", "layer", "model"])
def test_scores_of_all_magnitudes(granularity: str):
    # every exponent that a float32 has, so that no bin of leading bits is special
    scores = [[2.0**exponent for exponent in range(-149, 128)]]
    found = selected({"only": (scores, 10)}, granularity)
    assert found["only"] == [list(range(267, 277))]


@pytest.mark.parametrize("granularity", ["neuron", "layer", "model"])
def test_all_entries_and_none(granularity: str):
    scores = normal(3, 4).abs().tolist()
    assert selected({"only": (scores, 12)}, granularity)["only"] == [[0, 1, 2, 3]] * 3
    assert selected({"only": (scores, 0)}, granularity)["only"] == [[]] * 3


@pytest.mark.parametrize(
    ("granularity", "expected"),
    [
        ("neuron", {"a": [[0], [0]], "b": [[0], [0]]}),
        ("layer", {"a": [[0, 1], []], "b": [[0, 1], []]}),
        ("model", {"a": [[0, 1, 2], [0]], "b": [[], []]}),
    ],
)
def test_equal_scores_select_the_first_neuron_and_the_first_layer(granularity: str, expected: dict[str, object]):
    ones = [[1.0] * 3] * 2
    assert selected({"a": (ones, 2), "b": (ones, 2)}, granularity) == expected


def test_the_fraction_goes_to_the_best_next_candidates_at_most_one_per_neuron():
    scores = [[9.0, 8, 7, 6], [5, 4, 0, 0], [3, 2, 1, 0]]  # the first neuron's third is better than all others' second
    found = selected({"only": (scores, 5)}, "neuron")["only"]
    assert found == [[0, 1], [0, 1], [0]]


@pytest.mark.parametrize("scored_elements", [1, 7, 21])
def test_rows_are_scored_in_chunks_that_fit(scored_elements: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(select, "SCORED_ELEMENTS", scored_elements)
    scores, asked = normal(10, 7).abs(), Counter()

    def score(first: int, last: int) -> Tensor:
        asked.update(range(first, last))
        assert (last - first) * 7 <= scored_elements or last - first == 1
        return scores[first:last]

    rows = as_rows(*select_entries({"only": Candidate(10, 7, 25, score)}, "neuron")["only"])
    assert rows == naive.by_neuron(scores.tolist(), 25)
    assert asked == Counter(range(10))
