"""Sums over activations, against float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from peft_fps.calibration import InputStatistics, statistics
from peft_fps.calibration.statistics import column_sums, token_counts
from tests.support.helpers import normal


def naive_sums(positions: Tensor, norm: str) -> list[float]:
    """Sums over the rows of `(positions, inputs)`, with Python's floats."""
    of = {"l1": abs, "l2": lambda a: a**2, "signed": float}[norm]
    return [sum(of(a) for a in column) for column in positions.double().t().tolist()]


# --- linear layers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["l1", "l2", "signed"])
@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 5, 6), (2, 3, 4, 6)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_column_sums(dtype: torch.dtype, shape: tuple[int, ...], norm: str):
    x = normal(*shape).to(dtype)
    sums, positions = column_sums(x, norm)
    assert sums.dtype == torch.float64
    assert positions == x.numel() // 6
    assert sums.tolist() == pytest.approx(naive_sums(x.reshape(-1, 6), norm), rel=1e-6, abs=1e-6)


@given(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=4), st.sampled_from([1, 7, 999]))
def test_masked_positions_are_left_out(kept: list[list[bool]], slice_elements: int):
    x, mask = normal(len(kept), 4, 5), torch.tensor(kept)
    inside = x.reshape(-1, 5)[mask.reshape(-1)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "RUN_ELEMENTS", slice_elements)
        for norm in ("l1", "l2"):
            for given_mask in (mask, mask.long(), mask.float()):
                sums, positions = column_sums(x, norm, given_mask)
                assert positions == sum(map(sum, kept))
                assert sums.tolist() == pytest.approx(naive_sums(inside, norm), rel=1e-6)


def test_what_is_masked_may_be_anything():
    x, mask = normal(2, 3, 4), torch.tensor([[1, 1, 0], [1, 0, 0]])
    x[0, 2], x[1, 1] = torch.nan, torch.inf
    sums, positions = column_sums(x, "l1", mask)
    assert positions == 3
    assert sums.tolist() == pytest.approx(naive_sums(torch.stack([x[0, 0], x[0, 1], x[1, 0]]), "l1"))


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_strided_activations(norm: str):
    x = normal(3, 4, 5).transpose(0, 1)[:, ::2]
    sums, positions = column_sums(x, norm)
    assert positions == 8
    assert sums.tolist() == pytest.approx(naive_sums(x.reshape(-1, 5), norm))


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("number", [300.0, 60_000.0])
def test_half_activations_do_not_overflow(number: float, norm: str):
    sums, positions = column_sums(torch.full((1000, 2), number, dtype=torch.float16), norm)
    mean = sums[0].item() / positions
    assert (mean if norm == "l1" else mean**0.5) == pytest.approx(number, rel=1e-3)


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_many_positions_keep_their_precision(dtype: torch.dtype, norm: str):
    # eight images of 112 x 112 pixels with a plain background
    x = torch.full((100_000, 2), 0.1, dtype=dtype)
    sums, positions = column_sums(x, norm)
    mean = sums[0].item() / positions
    assert (mean if norm == "l1" else mean**0.5) == pytest.approx(float(x[0, 0]), rel=1e-4)


def test_the_activations_are_not_changed():
    x = normal(3, 4)
    before = x.clone()
    column_sums(x, "l1")
    column_sums(x, "l2", torch.tensor([1, 0, 1]))
    assert torch.equal(x, before)


# --- means ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "expected"), [("l1", [[2.0, 0.0], [1.0, 0.5]]), ("l2", [[2.0**0.5, 0.0], [1.0, 0.5**0.5]])]
)
def test_typical_activation(norm: str, expected: list[list[float]]):
    found = InputStatistics(torch.tensor([[8.0, 0.0], [4.0, 2.0]], dtype=torch.float64), 4).typical(norm)
    assert found.dtype == torch.float64
    assert found.tolist() == expected


def test_a_layer_that_saw_masked_positions_only_has_no_typical_activation():
    assert InputStatistics(torch.zeros(1, 2, dtype=torch.float64), 0).typical("l2").tolist() == [[0.0, 0.0]]


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.sampled_from(["l1", "l2"]))
def test_the_sum_over_batches_does_not_depend_on_the_split(sizes: list[int], norm: str):
    x: Any = normal(sum(sizes), 3, 4)
    whole, positions = column_sums(x, norm)
    parts = [column_sums(part, norm) for part in x.split(sizes)]
    assert sum(count for _, count in parts) == positions
    torch.testing.assert_close(sum(total for total, _ in parts), whole, rtol=1e-6, atol=0)


# --- embeddings -----------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3), min_size=1, max_size=4), st.data())
def test_token_counts_are_the_sums_of_one_hot_inputs(ids: list[list[int]], data: st.DataObject):
    row = st.lists(st.sampled_from([0, 1]), min_size=3, max_size=3)
    mask = data.draw(st.lists(row, min_size=len(ids), max_size=len(ids)))
    tokens = torch.tensor(ids)
    for kept in (None, torch.tensor(mask)):
        one_hot = F.one_hot(tokens if kept is None else tokens[kept.bool()], 6).reshape(-1, 6)
        counts, positions = token_counts(tokens, 6, kept)
        assert counts.dtype == torch.float64
        assert positions == len(one_hot)
        for norm in ("l1", "l2"):
            assert counts.tolist() == naive_sums(one_hot, norm)


@pytest.mark.parametrize("tokens", [torch.tensor([4, 0, 4]), torch.tensor([[4, 0, 4]])])
def test_positions_that_samples_share_count_for_each_sample(tokens: Tensor):
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    counts, positions = token_counts(tokens.to(mask.device), 5, mask)
    assert counts.tolist() == [2, 0, 0, 0, 3]
    assert positions == 5
