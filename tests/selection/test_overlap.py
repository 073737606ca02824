"""The Jaccard index of two selections, against Python sets."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from peft_fps.selection.overlap import Overlap, measure_overlap


Places = dict[str, set[int]]

BLOCK_OF = {"a.0.x": "a.0", "a.0.y": "a.0", "a.1.x": "a.1", "b.0.x": "b.0", "stem": None, "größe": None, "0": "0"}


def sorted_positions(places: Places) -> dict[str, Tensor]:
    return {path: torch.tensor(sorted(found), dtype=torch.int64) for path, found in places.items()}


def overlap(first: Places, second: Places) -> Overlap:
    return measure_overlap(sorted_positions(first), sorted_positions(second))


def naive_jaccard(first: Places, second: Places, paths: list[str]) -> float:
    one, other = ({(path, place) for path in paths for place in places[path]} for places in (first, second))
    return len(one & other) / len(one | other) if one | other else 1.0


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Places, Places]:
    """Two selections of the same modules, some of them empty."""
    paths = draw(st.lists(st.sampled_from(list(BLOCK_OF)), unique=True))
    places = st.sets(st.integers(0, 12) | st.just(2**40))
    first = {path: draw(places) for path in paths}
    return first, {path: draw(st.just(first[path]) | places) for path in paths}


@given(pairs())
def test_the_overlap_is_that_of_the_sets(pair: tuple[Places, Places]):
    first, second = pair
    found = overlap(first, second)
    assert found.total == naive_jaccard(first, second, list(first))
    assert found.modules == {path: naive_jaccard(first, second, [path]) for path in first}
    blocks = {block for path in first if (block := BLOCK_OF[path]) is not None}
    assert found.blocks == {
        block: naive_jaccard(first, second, [path for path in first if BLOCK_OF[path] == block]) for block in blocks
    }


@given(pairs())
def test_the_overlap_is_symmetric_and_one_with_itself(pair: tuple[Places, Places]):
    first, second = pair
    assert overlap(first, second) == overlap(second, first)
    own = overlap(first, first)
    assert {own.total, *own.modules.values(), *own.blocks.values()} == {1.0}


def test_overlaps_that_are_easily_told():
    found = overlap({"a": {0, 1, 6}, "b": set(), "c": {1}}, {"a": {1, 3, 6}, "b": set(), "c": set()})
    assert found.modules == {"a": 0.5, "b": 1.0, "c": 0.0}
    assert found.total == 2 / 5
    assert found.blocks == {}


def test_the_order_of_the_modules_is_the_first_selection_s():
    first, second = {"b": {0}, "a": {1}}, {"a": {1}, "b": {2}}
    assert list(overlap(first, second).modules) == ["b", "a"]


@pytest.mark.parametrize(
    ("paths", "blocks"),
    [
        (["encoder.block.0.layer.0.q", "encoder.block.0.layer.1.wi"], {"encoder.block.0"}),  # the outer number counts
        (["encoder.block.0.q", "decoder.block.0.q"], {"encoder.block.0", "decoder.block.0"}),
        (["head.0", "head.2"], {"head.0", "head.2"}),
        (["stem", "fc1"], set()),
    ],
)
def test_modules_are_grouped_by_their_block(paths: list[str], blocks: set[str]):
    assert set(overlap(dict.fromkeys(paths, {1}), dict.fromkeys(paths, {1})).blocks) == blocks


def test_the_table():
    first = {"stem": {0, 1}, "h.0.in": {0, 1}, "h.0.out": {0}}
    second = {"stem": {0, 1}, "h.0.in": {1, 2}, "h.0.out": {3}}
    assert str(overlap(first, second)).splitlines() == [
        "module   overlap",
        "----------------",
        "stem      1.0000",
        "h.0.in    0.3333",
        "h.0.out   0.0000",
        "----------------",
        "h.0       0.2000",
        "----------------",
        "total     0.4286",
    ]


def test_the_table_without_blocks():
    assert str(overlap({"a": {0}}, {"a": {1}})).splitlines() == [
        "module  overlap",
        "---------------",
        "a        0.0000",
        "---------------",
        "total    0.0000",
    ]
