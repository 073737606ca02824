"""The entries of one module: built by hand, refused where they are none, against masks."""

from typing import Any

import pytest
import torch
from hypothesis import given

from peft_fps.selection import LayerShape
from peft_fps.selection.entries import ModuleEntries, check_same_modules
from peft_fps.sparse import StructureError
from tests.support.helpers import csr, selections


Rows = list[list[int]]


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint16, torch.int8])
def test_entries_take_any_integers_and_copy_them(dtype: torch.dtype):
    columns, counts = torch.tensor([1, 0, 2]).to(dtype), torch.tensor([1, 0, 2]).to(dtype)
    module = ModuleEntries(columns, counts, 3)
    columns[:2] = 0
    assert (module.columns.tolist(), module.row_counts.tolist()) == ([1, 0, 2], [1, 0, 2])
    assert (module.neurons, module.entries) == (3, 3)
    assert module.columns.dtype == module.row_counts.dtype == torch.int32


@given(selections())
def test_positions_are_places_in_the_flattened_weight(selection: tuple[int, Rows]):
    inputs, rows = selection
    mask = torch.zeros(len(rows), inputs, dtype=torch.bool)
    for i, row in enumerate(rows):
        for column in row:
            mask[i, column] = True
    positions = ModuleEntries(*csr(rows), inputs).positions()
    assert positions.dtype == torch.int64
    assert positions.tolist() == mask.reshape(-1).nonzero()[:, 0].tolist()


def test_positions_beyond_32_bits():
    counts = torch.zeros(5, dtype=torch.int64)
    counts[4] = 1
    module = ModuleEntries(torch.tensor([2**31 - 1]), counts, 2**31)
    assert module.positions().tolist() == [4 * 2**31 + 2**31 - 1]


@pytest.mark.parametrize(
    ("columns", "counts", "inputs", "error", "says"),
    [
        ([1, 0], [2], 3, ValueError, "not strictly increasing within neuron 0"),
        ([1, 3], [2], 3, ValueError, r"fps_columns ranges over \[1, 3\], expected \[0, 2\]"),
        ([1.0], [1], 3, ValueError, "fps_columns has dtype torch.float32, expected an integer"),
        ([], [], 0, ValueError, r"inputs is 0, expected a fan-in between 1 and 2\*\*31"),
        ([], [0], 2**31 + 1, ValueError, "inputs is 2147483649, expected a fan-in"),
        ([0], [1], 3.0, TypeError, "inputs is 3.0 of type float, expected an integer"),
        ([0], [1], True, TypeError, "inputs is True of type bool, expected an integer"),
    ],
    ids=["order", "range", "dtype", "no inputs", "too many inputs", "float inputs", "bool inputs"],
)
def test_entries_that_are_none_are_refused(
    columns: list[float], counts: list[int], inputs: Any, error: type[Exception], says: str
):
    tensor = torch.tensor(columns) if columns else torch.tensor(columns, dtype=torch.int64)
    with pytest.raises(error, match=says):
        ModuleEntries(tensor, torch.tensor(counts, dtype=torch.int64), inputs)


def test_tensors_of_another_size_are_refused():
    with pytest.raises(StructureError, match="fps_row_counts has 2 elements, expected one per neuron, 3"):
        ModuleEntries.of_size(*csr([[0], [1]]), 3, 4)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"b": None}, "b: not in the one, expected all 2 modules of the other. Do this."),
        ({"c": (4, 12)}, "c: in the one, expected the 2 modules of the other alone. Do this."),
        ({"b": (3, 12)}, "b: found 3 neurons with 12 inputs in the one, expected 4 with 12 as in the other. Do this."),
        ({"b": (4, 11)}, "b: found 4 neurons with 11 inputs in the one, expected 4 with 12 as in the other. Do this."),
        ({}, None),
    ],
    ids=["missing", "unknown", "neurons", "fan-in", "same"],
)
def test_other_modules_are_named(change: dict[str, Any], says: str | None):
    expected = {"a": (2, 3), "b": (4, 12)}
    found = {path: size for path, size in (expected | change).items() if size is not None}

    def made(sizes: dict[str, tuple[int, int]]) -> dict[str, LayerShape]:
        return {path: ModuleEntries(*csr([[]] * neurons), inputs).shape for path, (neurons, inputs) in sizes.items()}

    other = {path: LayerShape(*size) for path, size in expected.items()}
    given_sizes = made(found), other, "the one", "the other", "Do this."
    if says is None:
        check_same_modules(*given_sizes)
        return
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is looked at below
        check_same_modules(*given_sizes)
    assert str(error.value) == says
