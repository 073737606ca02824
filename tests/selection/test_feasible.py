"""Too few entries for a granularity: refused from sizes alone, with advice that helps."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_fps.selection import LayerShape, allocate, check_granularity, select_entries
from tests.selection.cases import candidate
from tests.support.helpers import normal


TWO = {"layers.0.up": LayerShape(12, 6), "layers.0.down": LayerShape(6, 12)}


@pytest.mark.parametrize(
    ("granularity", "entries", "parts"),
    [
        ("block", 17, ("each of the 18 neurons of 2 modules", "per_neuron to at least 1 ", "at least 0.041,")),
        ("row", 5, ("6 of one whole neuron of layers.0.up", "per_neuron to at least 0.45 ", "least 0.031,")),
        ("column", 5, ("6 of one whole input of layers.0.down", "per_neuron to at least 0.45 ", "0.031,")),
    ],
)
def test_too_few_entries_are_refused_with_the_numbers_and_the_way_out(
    granularity: str, entries: int, parts: tuple[str, ...]
):
    # 23 biases: (18 + 23) / 1000, and (6 + 2 + 23) / 1000 with an entry to lose per module
    with pytest.raises(ValueError, match="another granularity") as caught:
        check_granularity(granularity, TWO, entries, biases=23, base_parameters=1000)
    for part in (f"granularity='{granularity}'", f"found {entries} entries", *parts):
        assert part in str(caught.value)
    check_granularity(granularity, TWO, entries + 1, biases=23, base_parameters=1000)


def test_without_the_base_parameters_no_budget_is_named():
    with pytest.raises(ValueError, match="Raise per_neuron to at least 1, or choose another granularity"):
        check_granularity("block", TWO, 1)


@pytest.mark.parametrize("granularity", ["block", "row", "column"])
def test_no_entries_at_all_are_bitfit(granularity: str):
    check_granularity(granularity, TWO, 0)
    check_granularity(granularity, {}, 0, biases=5)


@pytest.mark.parametrize("granularity", ["neuron", "layer", "model"])
def test_the_other_granularities_need_nothing(granularity: str):
    check_granularity(granularity, TWO, 1)


@pytest.mark.parametrize("granularity", ["block", "row", "column"])
def test_selecting_refuses_the_same(granularity: str):
    scores = normal(6, 7).abs()
    with pytest.raises(ValueError, match=f"granularity='{granularity}' found 3 entries"):
        select_entries({"a": candidate(scores, 2), "b": candidate(scores, 1)}, granularity)


SHAPES = st.builds(LayerShape, neurons=st.integers(1, 40), inputs=st.integers(1, 60))


@given(
    st.lists(SHAPES, min_size=1, max_size=4),
    st.sampled_from(["block", "row", "column"]),
    st.integers(0, 200),
    st.integers(0, 3000),
)
def test_the_per_neuron_and_the_budget_that_a_refusal_names_are_enough(
    shapes: list[LayerShape], granularity: str, biases: int, others: int
):
    layers = {f"layers.{i}": shape for i, shape in enumerate(shapes)}
    base = sum(shape.neurons * shape.inputs for shape in shapes) + biases + others
    try:
        check_granularity(granularity, layers, 1, biases=biases, base_parameters=base)
    except ValueError as error:
        named = re.search(r"per_neuron to at least (\S+) or the budget to at least (\S+), or", str(error))
        assert named is not None
        per_neuron, budget = float(named[1]), float(named[2])
        options = [{"budget": None, "per_neuron": per_neuron}]
        if budget <= 1:  # all weights may be fewer than the margin asks for
            options.append({"budget": budget, "per_neuron": None})
        for option in options:
            found = allocate(layers, biases=biases, base_parameters=base, **option)
            check_granularity(granularity, layers, sum(found.entries.values()))
