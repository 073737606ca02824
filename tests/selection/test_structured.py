"""Whole neurons and whole inputs against sums in plain Python."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from peft_fps.selection import Candidate, LayerShape, select_entries
from peft_fps.selection.structured import whole_numbers
from tests.selection import naive
from tests.selection.cases import CHUNK, Layers, as_rows, candidate, layers, selected
from tests.support.helpers import normal


EXACT = st.sampled_from([0.0, 0.25, 0.5, 0.50390625, 1.0, 1.0078125, 2.0])  # float64 sums of these are exact


@given(
    layers(EXACT),
    st.sampled_from(["row", "column"]),
    st.sampled_from(["top", "bottom"]),
    st.sampled_from([1, 5, 1 << 22]),
)
def test_whole_neurons_and_inputs_with_the_largest_or_smallest_sums(
    given_layers: Layers, granularity: str, order: str, scored_elements: int
):
    total = sum(entries for _, entries in given_layers.values())
    smallest = min(len(scores[0]) if granularity == "row" else len(scores) for scores, _ in given_layers.values())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CHUNK, scored_elements)
        if 0 < total < smallest:
            with pytest.raises(ValueError, match=f"granularity='{granularity}' found {total} entries"):
                selected(given_layers, granularity, order=order)
            return
        found = selected(given_layers, granularity, order=order)
    assert found == naive.by_whole(given_layers, granularity, order)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 6), st.floats(0, 1)), min_size=1, max_size=5))
def test_the_total_is_never_exceeded_and_what_is_left_fills_no_further_neuron(drawn: list[tuple[int, int, float]]):
    sizes = [(size, count) for size, count, _ in drawn]
    entries = [int(share * size * count) for size, count, share in drawn]
    numbers = whole_numbers(entries, sizes)
    assert numbers == naive.whole_numbers(entries, sizes)
    left = sum(entries) - sum(number * size for number, (size, _) in zip(numbers, sizes, strict=True))
    assert left >= 0
    assert all(0 <= number <= count for number, (_, count) in zip(numbers, sizes, strict=True))
    assert all(left < size for number, (size, count) in zip(numbers, sizes, strict=True) if number < count)
    # chosen again from what was chosen, nothing is lost
    assert whole_numbers([n * size for n, (size, _) in zip(numbers, sizes, strict=True)], sizes) == numbers


@pytest.mark.parametrize(
    ("entries", "sizes", "expected"),
    [
        ([5, 5], [(3, 4), (4, 4)], [2, 1]),  # 2 left by the first: 7 make one row of 4, and a further one of 3
        ([2, 2], [(4, 2), (4, 2)], [0, 1]),
        ([2, 2], [(4, 2), (5, 2)], [1, 0]),  # too little in the second, so the first is asked again
        ([8, 8], [(4, 2), (4, 2)], [2, 2]),
        ([0, 0], [(4, 2), (4, 2)], [0, 0]),
    ],
)
def test_what_fills_no_whole_neuron_goes_to_the_next_layer(
    entries: list[int], sizes: list[tuple[int, int]], expected: list[int]
):
    assert whole_numbers(entries, sizes) == expected


def test_far_scores_a_node_by_the_sum_and_not_by_its_largest_weight():
    scores = [[9.0, 0.0, 0.0], [4.0, 4.0, 4.0], [3.0, 3.0, 3.0]]
    assert selected({"only": (scores, 3)}, "row")["only"] == [[], [0, 1, 2], []]
    assert selected({"only": (scores, 6)}, "row")["only"] == [[0, 1, 2], [0, 1, 2], []]  # 9 each, the first wins
    assert selected({"only": (scores, 3)}, "column")["only"] == [[0]] * 3
    assert selected({"only": (scores, 3)}, "column", order="bottom")["only"] == [[1]] * 3


@pytest.mark.parametrize("scored_elements", [2, 1 << 22])
def test_sums_are_formed_in_float64(scored_elements: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(CHUNK, scored_elements)
    scores = [[1.0, 0.0], [1.0, 2.0**-30]]  # equal in float32
    assert selected({"only": (scores, 2)}, "row")["only"] == [[], [0, 1]]
    columns = torch.tensor(scores).t().tolist()
    assert selected({"only": (columns, 2)}, "column")["only"] == [[1]] * 2


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("granularity", ["row", "column"])
def test_ties_of_bfloat16_scores_go_to_the_lowest_index(granularity: str):
    scores = (normal(300, 3).abs() if granularity == "row" else normal(3, 300).abs()).mul(4).round()
    given_layers = {"only": (scores.tolist(), 300)}
    assert selected(given_layers, granularity) == naive.by_whole(given_layers, granularity, "top")


def test_a_layer_that_gets_nothing_is_not_scored():
    def refuse(first: int, last: int) -> Tensor:
        raise AssertionError("scored")

    found = select_entries(
        {"wide": Candidate(LayerShape(2, 50), 3, refuse), "narrow": candidate([[1.0, 2.0]], 0)}, "row"
    )
    assert as_rows(*found["wide"]) == [[], []]
    assert as_rows(*found["narrow"]) == [[0, 1]]
