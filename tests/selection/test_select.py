"""The granularities against sorting everything, from the top and from the bottom."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from peft_fps.selection import Candidate, LayerShape, select_entries
from tests.selection import naive
from tests.selection.cases import CHUNK, Layers, as_rows, layers, selected
from tests.support.helpers import normal


GRANULARITIES = ["neuron", "layer", "model", "block", "row", "column"]


@pytest.mark.parametrize("order", ["top", "bottom"])
@pytest.mark.parametrize("granularity", ["neuron", "layer", "model"])
@given(given_layers=layers(), scored_elements=st.sampled_from([1, 5, 1 << 22]))
def test_the_entries_are_those_that_sorting_finds(
    granularity: str, order: str, given_layers: Layers, scored_elements: int
):
    sign = 1 if order == "top" else -1
    signed = {name: [[sign * score for score in row] for row in scores] for name, (scores, _) in given_layers.items()}
    entries = {name: number for name, (_, number) in given_layers.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CHUNK, scored_elements)
        found = selected(given_layers, granularity, order=order)
    if granularity == "model":
        assert found == naive.by_model(signed, sum(entries.values()))
        return
    one = naive.by_neuron if granularity == "neuron" else naive.by_layer
    assert found == {name: one(scores, entries[name]) for name, scores in signed.items()}
    for name, rows in found.items():
        k = entries[name] / len(rows)
        assert sum(map(len, rows)) == entries[name]
        if granularity == "neuron":
            assert {len(row) for row in rows} <= {int(k), int(-(-k // 1))}


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


@pytest.mark.parametrize("order", ["top", "bottom"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_all_entries_and_none(granularity: str, order: str):
    scores = normal(3, 4).abs().tolist()
    assert selected({"block.0": (scores, 12)}, granularity, order=order)["block.0"] == [[0, 1, 2, 3]] * 3
    assert selected({"block.0": (scores, 0)}, granularity, order=order)["block.0"] == [[]] * 3


@pytest.mark.parametrize(
    ("granularity", "expected"),
    [
        ("neuron", {"a": [[0], [0]], "b": [[0], [0]]}),
        ("layer", {"a": [[0, 1], []], "b": [[0, 1], []]}),
        ("model", {"a": [[0, 1, 2], [0]], "b": [[], []]}),
        ("block", {"a": [[0], [0]], "b": [[0], [0]]}),
        ("row", {"a": [[], []], "b": [[0, 1, 2], []]}),  # 2 of "a" fill no neuron and are left to "b"
        ("column", {"a": [[0], [0]], "b": [[0], [0]]}),
    ],
)
@pytest.mark.parametrize("order", ["top", "bottom"])
def test_equal_scores_select_the_first_neuron_and_the_first_layer(
    granularity: str, expected: dict[str, object], order: str
):
    ones = [[1.0] * 3] * 2
    assert selected({"a": (ones, 2), "b": (ones, 2)}, granularity, order=order) == expected


def test_the_fraction_goes_to_the_best_next_candidates_at_most_one_per_neuron():
    scores = [[9.0, 8, 7, 6], [5, 4, 0, 0], [3, 2, 1, 0]]  # the first neuron's third is better than all others' second
    found = selected({"only": (scores, 5)}, "neuron")["only"]
    assert found == [[0, 1], [0, 1], [0]]


@pytest.mark.parametrize("scored_elements", [1, 7, 21])
@pytest.mark.parametrize("granularity", ["neuron", "row", "column"])
def test_rows_are_scored_once_in_chunks_that_fit(
    granularity: str, scored_elements: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(CHUNK, scored_elements)
    scores, asked = normal(10, 7).abs().mul(8).round(), Counter()

    def score(first: int, last: int) -> Tensor:
        asked.update(range(first, last))
        assert (last - first) * 7 <= scored_elements or last - first == 1
        return scores[first:last]

    rows = as_rows(*select_entries({"only": Candidate(LayerShape(10, 7), 25, score)}, granularity)["only"])
    if granularity == "neuron":
        assert rows == naive.by_neuron(scores.tolist(), 25)
    else:
        assert rows == naive.by_whole({"only": (scores.tolist(), 25)}, granularity, "top")["only"]
    assert asked == Counter(range(10))


@given(layers(), st.sampled_from(["neuron", "layer", "model", "block"]), st.sampled_from(["top", "bottom"]))
def test_the_entries_given_are_all_used(given_layers: Layers, granularity: str, order: str):
    total = sum(entries for _, entries in given_layers.values())
    neurons = sum(len(scores) for scores, _ in given_layers.values())
    if granularity == "block" and 0 < total < neurons:
        with pytest.raises(ValueError, match="granularity='block' found"):
            selected(given_layers, granularity, order=order)
        return
    found = selected(given_layers, granularity, order=order)
    assert sum(len(row) for rows in found.values() for row in rows) == total
    assert found == selected(given_layers, granularity, order=order)


@pytest.mark.parametrize("order", ["top", "bottom"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_without_layers_nothing_is_selected(granularity: str, order: str):
    """As of an adapter that trains the biases of norms alone."""
    assert select_entries({}, granularity, order=order) == {}


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_planted_scores_are_found_whatever_else_there_is(granularity: str):
    # the third neuron and the fifth input, far above a background of all magnitudes
    scores = 2.0 ** -(normal(6, 8).abs() * 10 + 10)
    scores[2] += 1.0
    scores[:, 5] += 1.0
    expected = {
        "neuron": [[5] for _ in range(6)],
        "block": [[5] for _ in range(6)],
        "row": [[], [], list(range(8)), [], [], []],
        "column": [[5] for _ in range(6)],
        "layer": [[5], [5], list(range(8)), [5], [5], [5]],
        "model": [[5], [5], list(range(8)), [5], [5], [5]],
    }
    entries = {"row": 8, "layer": 13, "model": 13}.get(granularity, 6)
    assert selected({"layers.0": (scores.tolist(), entries)}, granularity)["layers.0"] == expected[granularity]


@pytest.mark.parametrize("order", ["top", "bottom"])
def test_the_best_of_all_layers_are_found_among_tied_bfloat16_scores(order: str):
    scores = {"a": normal(30, 40).abs().bfloat16().float(), "b": normal(20, 30, seed=1).abs().bfloat16().float()}
    scores["b"][3:9] = 0.0  # many zeros, as short training leaves them
    sign = 1.0 if order == "top" else -1.0
    for total in (100, 900, 1700):
        found = selected(
            {name: (tensor.tolist(), total // 2) for name, tensor in scores.items()}, "model", order=order
        )
        assert found == naive.by_model({name: (sign * tensor).tolist() for name, tensor in scores.items()}, total)
