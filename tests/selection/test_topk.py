"""Top-k against a sort by score and index."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_fps.selection import reversed_order, top_k, top_k_flat
from tests.selection.naive import best


TIED = [0.0, 0.5, 0.5078125, 1.0, 3.0, 1e-40, 3e38]  # few values, as bfloat16 weights have; a denormal, a huge one
SCORES = st.one_of(st.sampled_from(TIED), st.floats(0, 2.0**100, width=32, allow_subnormal=False))


@st.composite
def matrices(draw: st.DrawFn) -> list[list[float]]:
    inputs = draw(st.integers(1, 9))
    return draw(st.lists(st.lists(SCORES, min_size=inputs, max_size=inputs), min_size=1, max_size=5))


def naive_top(scores: list[float], k: int) -> list[int]:
    return best([(score, i) for i, score in enumerate(scores)], k)


@given(matrices(), st.data())
def test_top_k_of_rows(scores: list[list[float]], data: st.DataObject):
    k = data.draw(st.integers(0, len(scores[0])))
    tensor = torch.tensor(scores)
    columns, values = top_k(tensor, k)
    expected = [naive_top(row, k) for row in tensor.tolist()]
    assert columns.dtype == torch.int64
    assert columns.tolist() == expected
    assert values.tolist() == [[row[i] for i in chosen] for row, chosen in zip(tensor.tolist(), expected, strict=True)]


@given(matrices(), st.data())
def test_top_k_flat(scores: list[list[float]], data: st.DataObject):
    tensor = torch.tensor(scores)
    k = data.draw(st.integers(0, tensor.numel()))
    positions = top_k_flat(tensor, k)
    assert positions.dtype == torch.int64
    assert positions.tolist() == sorted(naive_top(tensor.reshape(-1).tolist(), k))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("k", [1, 7, 100, 999])
def test_ties_of_bfloat16_scores_go_to_the_lowest_index(k: int):
    scores = torch.randn(6, 1000, generator=torch.Generator().manual_seed(0)).abs().bfloat16().float()
    columns, _ = top_k(scores, k)
    assert columns.tolist() == [naive_top(row, k) for row in scores.tolist()]
    assert top_k_flat(scores, k).tolist() == sorted(naive_top(scores.reshape(-1).tolist(), k))


def test_equal_scores_select_the_first():
    columns, _ = top_k(torch.ones(3, 50), 4)
    assert columns.tolist() == [[0, 1, 2, 3]] * 3
    assert top_k_flat(torch.zeros(3, 50), 4).tolist() == [0, 1, 2, 3]


def test_strided_scores():
    scores = torch.tensor([[3.0, 1, 3, 2], [1, 1, 0, 1]]).t().contiguous().t()
    assert top_k(scores, 2)[0].tolist() == [[0, 2], [0, 1]]
    assert top_k_flat(scores, 3).tolist() == [0, 2, 3]


SPECIAL = [0.0, 1e-45, 2.0**-149 * 3, 2.0**-126, 1.0, 1.0 + 2.0**-23, 3.4028234663852886e38]
ANY = st.one_of(st.sampled_from(SPECIAL), st.floats(0, 3.4028234663852886e38, width=32, allow_subnormal=True))


@given(st.lists(ANY.map(abs), min_size=1, max_size=30))
def test_reversed_order_is_exactly_the_opposite_with_ties_kept(numbers: list[float]):
    scores = torch.tensor(numbers, dtype=torch.float32)
    turned = reversed_order(scores)
    assert turned.dtype == torch.float32
    assert bool(turned.isfinite().all())
    assert not bool(turned.signbit().any())  # top_k reads bits: a negative zero would sort above all
    for i, a in enumerate(scores.tolist()):
        for j, b in enumerate(scores.tolist()):
            assert (a < b) == (turned[i].item() > turned[j].item())
    assert torch.equal(reversed_order(turned), scores)


def test_reversed_order_exchanges_zero_and_the_largest_float():
    largest = torch.finfo(torch.float32).max
    assert reversed_order(torch.tensor([0.0, largest])).tolist() == [largest, 0.0]
    neighbours = torch.tensor([0.0, 1e-45, 3e-45])  # subnormals differ by one bit
    assert top_k(reversed_order(neighbours[None]), 3)[0].tolist() == [[0, 1, 2]]


def test_reversed_order_of_expanded_and_strided_scores():
    row = torch.tensor([1.0, 3.0, 2.0])
    assert top_k(reversed_order(row.expand(2, 3)), 2)[0].tolist() == [[0, 2]] * 2
    assert top_k(reversed_order(torch.stack([row, row.flip(0)]).t()), 1)[0].tolist() == [[0], [0], [1]]


@given(matrices(), st.data())
def test_the_top_of_the_reversed_order_is_the_bottom(scores: list[list[float]], data: st.DataObject):
    k = data.draw(st.integers(0, len(scores[0])))
    tensor = torch.tensor(scores)
    expected = [naive_top([-score for score in row], k) for row in tensor.tolist()]
    assert top_k(reversed_order(tensor), k)[0].tolist() == expected
