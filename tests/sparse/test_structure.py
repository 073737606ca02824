"""Checks of selections from anywhere, and the index tensors derived from them."""

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_fps.sparse import StructureError, build_structure, check_entries, even_row_counts, unite_structures
from tests.sparse import cases
from tests.support.helpers import flat_positions, selections


VALID = {"columns": [0, 2, 1], "row_counts": [2, 1]}
VALUES = [0.5, -1.0, 2.0]

BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    # what is given instead, what the error says is found, and what expected
    "float columns": ({"columns": [0.0, 2, 1]}, "torch.float32", "integer"),
    "bool columns": ({"columns": [True, False, True]}, "torch.bool", "integer"),
    "complex columns": ({"columns": [0j, 2, 1]}, "torch.complex64", "integer"),
    "float counts": ({"row_counts": [2.0, 1]}, "torch.float32", "integer"),
    "bool counts": ({"row_counts": [True, True]}, "torch.bool", "integer"),
    "2d columns": ({"columns": [[0, 2, 1]]}, "(1, 3)", "one dimension"),
    "0d columns": ({"columns": 0}, "()", "one dimension"),
    "2d counts": ({"row_counts": [[2, 1]]}, "(1, 2)", "one dimension"),
    "too few counts": ({"row_counts": [3]}, "1 elements", "one per neuron, 2"),
    "too many counts": ({"row_counts": [1, 1, 1]}, "3 elements", "neuron, 2"),
    "negative count": ({"row_counts": [4, -1]}, "[-1, 4]", "[0, 3]"),
    "count above inputs": ({"columns": [0, 1, 2, 2], "row_counts": [4, 0]}, "[0, 4]", "[0, 3]"),
    "sum": ({"row_counts": [2, 2]}, "3 elements", "sum of fps_row_counts, 4"),
    "missing": ({"columns": [0, 2]}, "2 elements", "sum of fps_row_counts, 3"),
    "negative column": ({"columns": [-1, 2, 1]}, "[-1, 2]", "[0, 2]"),
    "column at inputs": ({"columns": [0, 3, 1]}, "[0, 3]", "[0, 2]"),
    "unsorted": ({"columns": [2, 0, 1]}, "within neuron 0", "sorted, unique"),
    "repeated": ({"columns": [1, 1, 1]}, "within neuron 0", "sorted, unique"),
    "unsorted in last": ({"row_counts": [1, 2]}, "within neuron 1", "sorted, unique"),
    "integer values": ({"values": [1, 2, 3]}, "torch.int64", "floating"),
    "too few values": ({"values": VALUES[:2]}, "(2,)", "(3,)"),
    "2d values": ({"values": [VALUES]}, "(1, 3)", "(3,)"),
    "nan": ({"values": [torch.nan] * 3}, "NaN or infinity", "finite"),
    "infinity": ({"values": [1, torch.inf, 0]}, "NaN or infinity", "finite"),
    "-infinity": ({"values": [1, -torch.inf, 0]}, "NaN or infinity", "finite"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_entries_are_refused_with_found_and_expected(case: str):
    change, found, expected = BAD[case]
    entries = {name: torch.tensor(numbers) for name, numbers in (VALID | change).items()}
    with pytest.raises(StructureError, match=f"{re.escape(found)}.*expected.*{re.escape(expected)}"):
        check_entries(**entries, neurons=2, inputs=3)


def test_structure_errors_are_value_errors_and_stop_a_build():
    with pytest.raises(ValueError, match="strictly increasing within neuron 0"):
        build_structure(torch.tensor([2, 0, 1]), torch.tensor([2, 1]), 2, 3)


@pytest.mark.parametrize("columns", [torch.uint8, torch.uint16, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("counts", [torch.uint8, torch.uint16, torch.uint32, torch.int32], ids=str)
@pytest.mark.parametrize("values", [None, torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_valid_entries_come_back_as_int64(columns: torch.dtype, counts: torch.dtype, values: torch.dtype | None):
    given_values = None if values is None else torch.tensor(VALUES, dtype=values)
    entries = torch.tensor(VALID["columns"]).to(columns), torch.tensor(VALID["row_counts"]).to(counts)
    found = check_entries(*entries, 2, 3, given_values)
    assert [tensor.dtype for tensor in found] == [torch.int64, torch.int64]
    assert found[0].tolist() == [0, 2, 1]
    assert found[1].tolist() == [2, 1]


def test_largest_small_integers_keep_their_value():
    columns, counts = torch.tensor([0, 65535]).to(torch.uint16), torch.tensor([2]).to(torch.uint8)
    assert check_entries(columns, counts, 1, 65536)[0].tolist() == [0, 65535]
    with pytest.raises(StructureError, match=r"\[0, 65535\], expected \[0, 65534\]"):
        check_entries(columns, counts, 1, 65535)


def test_no_entries_at_all_are_valid():
    columns, counts = check_entries(torch.tensor([], dtype=torch.int32), torch.zeros(2, dtype=torch.int32), 2, 3)
    assert columns.numel() == 0
    assert counts.tolist() == [0, 0]
    empty = build_structure(columns, counts, 2, 3)
    assert [t.tolist() for t in (empty.positions, empty.rows, empty.union, empty.union_positions)] == [[]] * 4
    assert empty.row_starts.tolist() == [0, 0, 0]


@given(st.integers(0, 40), st.integers(1, 9))
def test_even_row_counts_spread_the_surplus_over_the_first(entries: int, neurons: int):
    expected = [0] * neurons
    for i in range(entries):
        expected[i % neurons] += 1
    assert even_row_counts(entries, neurons).tolist() == expected


@given(selections(), st.booleans(), st.sampled_from([1, 3, 8, 1 << 22]))
def test_build_structure_against_naive_positions(
    selection: tuple[int, list[list[int]]], transposed: bool, product_elements: int
):
    inputs, rows = selection
    built = cases.built(rows, inputs, transposed, product_elements)
    assert (built.neurons, built.inputs, built.transposed) == (len(rows), inputs, transposed)
    assert built.positions.tolist() == flat_positions(rows, inputs, transposed)
    union = cases.union(rows)
    assert built.union.tolist() == union
    entries = [(row, column) for row, columns in enumerate(rows) for column in columns]
    assert built.rows.tolist() == [row for row, _ in entries]
    assert built.union_positions.tolist() == [union.index(column) for _, column in entries]
    assert built.row_starts.tolist() == [sum(map(len, rows[:row])) for row in range(len(rows) + 1)]

    # the chunks are runs of whole rows, one behind the other, with the entries of these rows
    row, entry = 0, 0
    for chunk in built.chunks:
        assert (chunk.first_row, chunk.first_entry) == (row, entry)
        assert chunk.last_row > chunk.first_row
        inside = rows[chunk.first_row : chunk.last_row]
        assert chunk.last_entry - chunk.first_entry == sum(map(len, inside))
        assert len(inside) * len(union) <= product_elements or len(inside) == 1
        row, entry = chunk.last_row, chunk.last_entry
    assert (row, entry) == (len(rows), sum(map(len, rows)))


def test_all_rows_are_one_chunk_where_the_product_fits():
    rows = [[0, 1], [1, 3], [0, 3]]  # three used columns
    assert len(cases.built(rows, 4, product_elements=9).chunks) == 1
    assert [chunk.last_row for chunk in cases.built(rows, 4, product_elements=8).chunks] == [2, 3]


@pytest.mark.parametrize(
    ("neurons", "inputs", "dtype"),
    [
        (2, 2**30 - 1, torch.int32),
        (2, 2**30, torch.int64),
        (1, 2**31 - 1, torch.int32),
        (1, 2**31, torch.int64),
    ],
)
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "transposed"])
def test_index_tensors_are_small_where_every_position_fits(
    neurons: int, inputs: int, dtype: torch.dtype, transposed: bool
):
    rows = [[]] * (neurons - 1) + [[0, inputs - 1]]
    built = cases.built(rows, inputs, transposed)
    for tensor in (built.positions, built.rows, built.row_starts, built.union_positions):
        assert tensor.dtype == dtype
    assert built.union.dtype == torch.int64
    assert built.positions.tolist() == flat_positions(rows, inputs, transposed)
    assert built.positions[-1] == neurons * inputs - 1
    united, places = unite_structures([built, built])
    assert united.positions.tolist() == built.positions.tolist()
    assert (places.dtype, places.tolist()) == (torch.int64, [0, 1, 0, 1])


@st.composite
def several_selections(draw: st.DrawFn) -> tuple[int, list[list[list[int]]]]:
    inputs, neurons = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    row = st.sets(st.integers(0, inputs - 1)).map(sorted)
    several = st.lists(st.lists(row, min_size=neurons, max_size=neurons), min_size=1, max_size=4)
    return inputs, draw(several)


@given(several_selections(), st.booleans())
def test_unite_structures_against_naive_set_union(several: tuple[int, list[list[list[int]]]], transposed: bool):
    inputs, lists = several
    neurons = len(lists[0])
    built = [cases.built(rows, inputs, transposed) for rows in lists]
    united, places = unite_structures(built)
    union = [sorted(set().union(*(rows[i] for rows in lists))) for i in range(neurons)]
    assert united.positions.tolist() == flat_positions(union, inputs, transposed)
    assert united.union.tolist() == sorted({column for row in union for column in row})
    assert (united.neurons, united.inputs, united.transposed) == (neurons, inputs, transposed)
    entries = [(i, column) for i, row in enumerate(union) for column in row]
    expected = [entries.index((i, column)) for rows in lists for i, row in enumerate(rows) for column in row]
    assert places.tolist() == expected
