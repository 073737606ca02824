"""W + ΔW against a dense sum, in every dtype."""

import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from peft_fps.sparse import compose_weight, dense_delta, merged_entries
from peft_fps.sparse.compose import compact_delta
from tests.sparse.cases import built, union
from tests.support.helpers import bits, flat_positions, normal, selections


ROWS, INPUTS = [[0, 3], [], [1, 2, 4], [0, 1, 2, 3, 4]], 5
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
HALVES = [torch.bfloat16, torch.float16]


def rounded(number: float, dtype: torch.dtype) -> float:
    """A float32 number rounded to nearest even in `dtype`, without torch."""
    if dtype == torch.bfloat16:
        (pattern,) = struct.unpack("<I", struct.pack("<f", number))
        pattern = (pattern + 0x7FFF + ((pattern >> 16) & 1)) & 0xFFFF0000
        return struct.unpack("<f", struct.pack("<I", pattern))[0]
    return float({torch.float16: np.float16, torch.float32: np.float32, torch.float64: np.float64}[dtype](number))


def summed(entry: float, value: float, exact: type, dtype: torch.dtype) -> float:
    """The sum of two numbers, formed in `exact` and rounded once to `dtype`."""
    return rounded(float(exact(entry) + exact(value)), dtype)


def exact_type(*dtypes: torch.dtype) -> type:
    return np.float64 if torch.float64 in dtypes else np.float32


def stored_weight(transposed: bool, dtype: torch.dtype) -> Tensor:
    shape = (INPUTS, len(ROWS)) if transposed else (len(ROWS), INPUTS)
    return normal(*shape).to(dtype)


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "transposed"])
@pytest.mark.parametrize("product", DTYPES, ids=lambda d: f"product-{d}")
@pytest.mark.parametrize("value", [torch.float32, torch.float64, torch.bfloat16], ids=lambda d: f"values-{d}")
@pytest.mark.parametrize("weight", DTYPES, ids=lambda d: f"weight-{d}")
def test_compose_weight(weight: torch.dtype, value: torch.dtype, product: torch.dtype, transposed: bool):
    stored = stored_weight(transposed, weight)
    values = (0.01 * normal(10, seed=1)).to(value)
    before = bits(stored)
    composed = compose_weight(stored, values, built(ROWS, INPUTS, transposed), product)
    expected = stored.to(product).double().reshape(-1).tolist()
    flat = stored.double().reshape(-1).tolist()
    for place, change in zip(flat_positions(ROWS, 5, transposed), values.double().tolist(), strict=True):
        expected[place] = summed(flat[place], change, exact_type(weight, value), product)
    whole = torch.tensor(expected, dtype=torch.float64).view(stored.shape)
    assert composed.dtype == product
    assert composed.double().tolist() == whole.tolist()
    assert bits(stored) == before
    assert composed.data_ptr() != stored.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [torch.float32, torch.float64], ids=str)
def test_merged_entries(dtype: torch.dtype, value: torch.dtype):
    stored, values = stored_weight(False, dtype), (0.01 * normal(10, seed=1)).to(value)
    places = flat_positions(ROWS, 5)
    untouched = bits(stored)
    before, after = merged_entries(stored, values, torch.tensor(places))
    flat = stored.double().reshape(-1).tolist()
    assert (before.dtype, after.dtype) == (dtype, dtype)
    assert before.double().tolist() == [flat[place] for place in places]
    assert after.double().tolist() == [
        summed(flat[place], change, exact_type(dtype, value), dtype)
        for place, change in zip(places, values.double().tolist(), strict=True)
    ]
    assert bits(stored) == untouched


@pytest.mark.parametrize(
    ("dtype", "half_unit"), [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)], ids=["bfloat16", "float16"]
)
def test_half_weights_are_rounded_once(dtype: torch.dtype, half_unit: float):
    # a little more than half a unit in the last place of 1: rounding the change first gives a tie, and 1 again
    stored, values = torch.ones(1, 1, dtype=dtype), torch.tensor([half_unit * (1 + 2.0**-12)])
    only = built([[0]], 1)
    expected = 1 + 2 * half_unit
    assert merged_entries(stored, values, only.positions)[1].item() == expected
    assert compose_weight(stored, values, only, dtype).item() == expected


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_wider_product_sees_the_whole_sum_of_a_half_weight(dtype: torch.dtype):
    stored, values = torch.ones(1, 1, dtype=dtype), torch.tensor([2.0**-20])
    only = built([[0]], 1)
    assert compose_weight(stored, values, only, torch.float32).item() == 1 + 2.0**-20


def test_composing_a_convolution_in_channels_last_memory():
    stored = normal(4, 3, 2, 2).to(memory_format=torch.channels_last)
    rows = [[0, 5], [11], [], [1, 2, 3]]
    values = normal(6, seed=1)
    expected = stored.clone().double()
    for place, change in zip(flat_positions(rows, 12), values.double().tolist(), strict=True):
        neuron, rest = divmod(place, 12)
        expected[neuron, rest // 4, rest % 4 // 2, rest % 2] += change
    composed = compose_weight(stored, values, built(rows, 12), torch.float32)
    torch.testing.assert_close(composed.double(), expected, rtol=1e-7, atol=1e-7)
    assert stored.is_contiguous(memory_format=torch.channels_last)


@given(selections(), st.booleans(), st.sampled_from([1, 4, 1 << 22]), st.sampled_from(DTYPES))
def test_dense_and_compact_delta(
    selection: tuple[int, list[list[int]]], transposed: bool, product_elements: int, dtype: torch.dtype
):
    inputs, rows = selection
    values = normal(sum(map(len, rows)), seed=2)
    dense = torch.zeros(len(rows), inputs)
    numbers = iter(values.tolist())
    for row, columns in enumerate(rows):
        for column in columns:
            dense[row, column] = next(numbers)
    where = built(rows, inputs, transposed, product_elements)
    shape = torch.Size((inputs, len(rows)) if transposed else (len(rows), inputs))
    assert dense_delta(values, where, shape).tolist() == (dense.t() if transposed else dense).tolist()
    compact = compact_delta(values, where, dtype)
    assert compact.dtype == dtype
    assert compact.shape == (len(rows), len(union(rows)))
    assert compact.tolist() == dense[:, union(rows)].to(dtype).tolist()
