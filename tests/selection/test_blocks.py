"""TR-PTS's numbers of entries per block: by hand, by the paper's formula, and by laws for random networks."""

from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_fps.selection import LayerShape, block_of
from peft_fps.selection.blocks import block_entries, entries_by_share
from tests.selection import naive
from tests.selection.cases import Layers, candidate, layers, selected
from tests.support.helpers import normal


@pytest.mark.parametrize(
    ("path", "block"),
    [
        ("vit.layers.3.attention.q_proj", "vit.layers.3"),
        ("encoder.layer.0", "encoder.layer.0"),
        ("bert.encoder.layer.11.output.dense", "bert.encoder.layer.11"),
        ("swin.encoder.layers.1.blocks.0.mlp", "swin.encoder.layers.1"),
        ("0", "0"),
        ("vit.embeddings.patch_embeddings.projection", None),
        ("model.conv2d.fc1", None),
        ("", None),
    ],
)
def test_block_of(path: str, block: str | None):
    assert block_of(path) == block


def network(best: dict[str, int], neurons: int = 4, inputs: int = 10, entries: int = 0) -> dict[str, Any]:
    """Layers of one size in which so many weights score 1, the others 0."""
    made = {}
    for name, count in best.items():
        scores = torch.zeros(neurons * inputs)
        scores[:count] = 1
        made[name] = candidate(scores.view(neurons, inputs), entries)
    return made


# --- by hand --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("c_min", "k"), [(1, (1, 2, 4)), (2, (2, 4, 8)), (Fraction(1, 2), (1, 1, 2))])
def test_the_papers_formula(c_min: Fraction | int, k: tuple[int, int, int]):
    """C_l = max(1, w_l / min(w) * C_min), with 2, 4 and 8 of the best 14 scores in three blocks."""
    best = {"blocks.0.fc": 2, "blocks.1.fc": 4, "blocks.2.fc": 8}
    assert k == tuple(max(1, Fraction(w, 2) * c_min) for w in best.values())
    given_layers = network(best)
    # only the sum over all layers counts
    given_layers["blocks.0.fc"] = replace(given_layers["blocks.0.fc"], entries=4 * sum(k))
    found = block_entries(given_layers, 14 / 120)
    assert found == {name: 4 * number for name, number in zip(best, k, strict=True)}


def test_a_block_is_all_its_modules_and_a_large_block_counts_by_its_share():
    # 6 of 80 weights in the first block, 6 of 40 in the second: shares as 1 to 2
    best = {"blocks.0.query": 6, "blocks.0.value": 0, "blocks.1.query": 6}
    found = block_entries(network(best, entries=8), 12 / 120)
    # 12 neurons with 24 entries: 8 c + 4 * 2 c = 24 at c = 1.5
    assert found == {"blocks.0.query": 6, "blocks.0.value": 6, "blocks.1.query": 12}


def test_modules_outside_any_block_and_blocks_without_a_share_get_one_per_neuron():
    best = {"patch_embeddings": 5, "blocks.0.fc": 0, "blocks.1.fc": 3, "blocks.2.fc": 6}
    found = block_entries(network(best, entries=14), 14 / 160)
    # 56 entries less 8 for the first two: 4 c + 8 c = 48
    assert found == {"patch_embeddings": 4, "blocks.0.fc": 4, "blocks.1.fc": 16, "blocks.2.fc": 32}


def test_a_fan_in_is_the_limit_and_the_others_share_what_it_leaves():
    shapes = {"a": LayerShape(4, 3), "b": LayerShape(4, 50), "c": LayerShape(4, 50)}
    shares = {"a": Fraction(1, 2), "b": Fraction(1, 2), "c": Fraction(1, 4)}
    # "a" is full with 12, and b : c = 2 : 1
    assert entries_by_share(shapes, shares, 12 + 60) == {"a": 12, "b": 40, "c": 20}
    # all that have a share are full: only then the one without gets more than one per neuron
    shares["c"] = Fraction(0)
    assert entries_by_share(shapes, shares, 12 + 200 + 4) == {"a": 12, "b": 200, "c": 4}
    assert entries_by_share(shapes, shares, 12 + 200 + 9) == {"a": 12, "b": 200, "c": 9}


def test_what_rounding_leaves_goes_to_the_largest_fractions_and_the_first_of_equal_ones():
    shapes = {name: LayerShape(3, 50) for name in "abc"}
    shares = dict.fromkeys("abc", Fraction(1, 7))
    assert entries_by_share(shapes, shares, 9 + 1) == {"a": 4, "b": 3, "c": 3}
    # 30 as 1 : 2 : 3; one more adds 1/6, 2/6 and 3/6, of which the largest is rounded up
    shares = {"a": Fraction(1, 7), "b": Fraction(2, 7), "c": Fraction(3, 7)}
    assert entries_by_share(shapes, shares, 30) == {"a": 5, "b": 10, "c": 15}
    assert entries_by_share(shapes, shares, 31) == {"a": 5, "b": 10, "c": 16}


def test_the_share_means_the_decimal_number_written_and_at_least_one_weight():
    hundred = network({"blocks.0.fc": 10, "blocks.1.fc": 19}, neurons=5, inputs=10, entries=29)
    # 0.29 of 100 are 29, though in binary fractions 28: then 58 would be shared as 10 to 18
    assert block_entries(hundred, 0.29) == {"blocks.0.fc": 20, "blocks.1.fc": 38}
    for block_top in (0.0, 0.001):  # the one best weight lies in the first block, which is filled
        assert block_entries(hundred, block_top) == {"blocks.0.fc": 50, "blocks.1.fc": 8}


def test_all_of_the_scores_mean_the_same_number_for_every_block():
    best = {"blocks.0.fc": 1, "blocks.1.fc": 30, "blocks.2.fc": 7}
    assert block_entries(network(best, entries=11), 1.0) == dict.fromkeys(best, 11)


# --- laws -----------------------------------------------------------------------------------------------------------


@st.composite
def shared(draw: st.DrawFn) -> tuple[dict[str, LayerShape], dict[str, Fraction], int]:
    shapes, shares = {}, {}
    for i in range(draw(st.integers(1, 6))):
        shapes[f"{i}"] = LayerShape(draw(st.integers(1, 7)), draw(st.integers(1, 30)))
        shares[f"{i}"] = draw(st.sampled_from([Fraction(n, 5040) for n in (0, 0, 1, 2, 630, 720, 5039, 5040)]))
    neurons = sum(shape.neurons for shape in shapes.values())
    weights = sum(shape.neurons * shape.inputs for shape in shapes.values())
    return shapes, shares, draw(st.integers(neurons, weights))


def by_bisection(shapes: dict[str, LayerShape], shares: dict[str, Fraction], total: int) -> dict[str, Fraction]:
    """Wanted entries for the common c, found by halving; a share of 0 stands for one too small to count before."""
    tiny = Fraction(1, 10**12)

    def wanted(c: Fraction) -> dict[str, Fraction]:
        return {
            name: shape.neurons * min(max(Fraction(1), c * (shares[name] or tiny)), Fraction(shape.inputs))
            for name, shape in shapes.items()
        }

    low, high = Fraction(0), Fraction(10**14)
    for _ in range(140):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(wanted(middle).values()) <= total else (low, middle)
    return wanted(low)


@given(shared())
def test_one_factor_for_all_and_the_total_met_to_the_entry(
    drawn: tuple[dict[str, LayerShape], dict[str, Fraction], int],
):
    shapes, shares, total = drawn
    found = entries_by_share(shapes, shares, total)
    assert list(found) == list(shapes)
    assert sum(found.values()) == total
    assert all(shape.neurons <= found[name] <= shape.neurons * shape.inputs for name, shape in shapes.items())
    for name, wanted in by_bisection(shapes, shares, total).items():
        assert abs(found[name] - wanted) < 1 + Fraction(1, 10**6)


@given(shared(), st.integers(0, 50))
def test_more_in_total_is_no_less_for_any_but_by_rounding(
    drawn: tuple[dict[str, LayerShape], dict[str, Fraction], int], more: int
):
    shapes, shares, total = drawn
    larger = min(total + more, sum(shape.neurons * shape.inputs for shape in shapes.values()))
    found = [entries_by_share(shapes, shares, number) for number in (total, larger)]
    assert all(low[name] <= high[name] + 1 for low, high in pairwise(found) for name in shapes)


BLOCKS = ["embed", "blocks.0.fc", "blocks.1.fc"]


@given(layers(), st.sampled_from([0.01, 0.1, 0.3, 0.7, 1.0]), st.sampled_from(["top", "bottom"]))
def test_the_whole_selection_against_sorting_everything(given_layers: Layers, block_top: float, order: str):
    named = dict(zip(BLOCKS, given_layers.values(), strict=False))
    neurons = sum(len(scores) for scores, _ in named.values())
    sizes = {name: len(scores) * len(scores[0]) for name, (scores, _) in named.items()}
    total = max(sum(entries for _, entries in named.values()), neurons)
    named = {name: (scores, total if i == 0 else 0) for i, (name, (scores, _)) in enumerate(named.items())}
    count = max(1, int(Fraction(str(block_top)) * sum(sizes.values())))
    best = naive.by_model({name: scores for name, (scores, _) in named.items()}, count)
    shares = {name: Fraction(sum(map(len, rows)), sizes[name]) for name, rows in best.items()} | {"embed": Fraction(0)}
    shapes = {name: LayerShape(len(scores), len(scores[0])) for name, (scores, _) in named.items()}
    numbers = entries_by_share(shapes, shares, total)
    found = selected(named, "block", block_top=block_top, order=order)
    sign = 1 if order == "top" else -1
    for name, (scores, _) in named.items():
        assert found[name] == naive.by_neuron([[sign * score for score in row] for row in scores], numbers[name])


def test_the_order_changes_which_entries_a_block_gets_but_not_how_many():
    scores = {"blocks.0.fc": normal(6, 20).abs(), "blocks.1.fc": 3 * normal(6, 20, seed=1).abs()}
    given_layers = {name: (tensor.tolist(), 30) for name, tensor in scores.items()}
    top = selected(given_layers, "block", block_top=0.3)
    bottom = selected(given_layers, "block", block_top=0.3, order="bottom")
    for name in scores:
        assert sum(map(len, top[name])) == sum(map(len, bottom[name]))
        assert all(not set(a) & set(b) for a, b in zip(top[name], bottom[name], strict=True))
    assert sum(map(len, top["blocks.1.fc"])) > sum(map(len, top["blocks.0.fc"]))


def test_planted_scores_draw_the_entries_to_their_block():
    scores = {f"vit.layers.{i}.{name}": normal(8, 40, seed=i).abs() for i in range(4) for name in ("q", "v")}
    scores["vit.layers.2.q"][:, 7:10] += 100.0  # 24 weights of 640
    given_layers = {name: (tensor.tolist(), 16) for name, tensor in scores.items()}
    found = selected(given_layers, "block", block_top=24 / 2560)
    for name, rows in found.items():
        # 128 entries: 48 for three blocks with none of the best, 80 for the 16 neurons of the other
        assert [len(row) for row in rows] == [5 if name.startswith("vit.layers.2.") else 1] * 8
    assert all({7, 8, 9} <= set(row) for row in found["vit.layers.2.q"])


def test_ties_at_the_cut_count_for_the_earlier_block():
    ones = [[1.0] * 10] * 4
    given_layers = {f"blocks.{i}.fc": (ones, 8) for i in range(3)}
    found = selected(given_layers, "block", block_top=60 / 120)  # 40 of the first block, 20 of the second
    # 24 entries, 4 for the last: 4 c + 2 c = 20, 13 1/3 and 6 2/3
    assert {name: sum(map(len, rows)) for name, rows in found.items()} == {
        "blocks.0.fc": 13,
        "blocks.1.fc": 7,
        "blocks.2.fc": 4,
    }
