"""What readers of one tensor keep of it together, and what each gets back."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from peft_fps.sparse import Kept, Reading, Structure, keep_columns, keep_whole, sparse_linear
from tests.sparse import cases
from tests.sparse.cases import Rows, at_entries, union
from tests.support.helpers import normal, selections


INPUTS = 9


def built(rows: Rows, inputs: int = INPUTS) -> Structure:
    return cases.built(rows, inputs)


def given_back(kept: Kept) -> Tensor:
    return kept.columns(*kept.tensors)


@st.composite
def readers(draw: st.DrawFn) -> list[Rows]:
    """Two to four selections over one input; empty, full, equal and disjoint ones are common."""
    row = st.one_of(
        st.sets(st.integers(0, INPUTS - 1), max_size=3).map(sorted), st.just([]), st.just(list(range(INPUTS)))
    )
    several = draw(st.lists(st.lists(row, min_size=1, max_size=3), min_size=2, max_size=3))
    return draw(st.permutations(several + [several[0]] * draw(st.integers(0, 1))))


@given(selections(), st.integers(0, 5))
def test_a_single_reader_keeps_its_columns(selection: tuple[int, Rows], tokens: int):
    inputs, rows = selection
    x = normal(tokens, inputs)
    kept = keep_columns(x, built(rows, inputs), Reading())
    assert [tensor.shape for tensor in kept.tensors] == [(tokens, len(union(rows)))]
    assert torch.equal(given_back(kept), x[:, union(rows)])


@given(readers())
def test_several_readers_keep_every_column_once(several: list[Rows]):
    x, reading = normal(4, INPUTS), Reading()
    kept = [keep_columns(x, built(rows), reading) for rows in several]
    assert sorted(torch.cat(reading.columns).tolist()) == union(*several)
    assert all(torch.equal(p, x[:, c]) for p, c in zip(reading.pieces, reading.columns, strict=True))
    pieces = {id(piece): piece for one in kept for piece in one.tensors}
    assert sum(piece.shape[1] for piece in pieces.values()) == len(union(*several))
    assert sorted(torch.cat(reading.columns).tolist()) == union(*several)
    assert all(torch.equal(p, x[:, c]) for p, c in zip(reading.pieces, reading.columns, strict=True))
    for place, (rows, one) in enumerate(zip(several, kept, strict=True)):
        assert torch.equal(given_back(one), x[:, union(rows)])
        # nothing is kept for a reader that comes later
        assert sum(piece.shape[1] for piece in one.tensors) == len(union(*several[: place + 1]))


def test_a_reader_after_backward_has_begun_starts_anew():
    x, reading, first, second = normal(4, INPUTS), Reading(), built([[0, 3]]), built([[3, 5]])
    before = keep_columns(x, first, reading)
    assert torch.equal(given_back(before), x[:, [0, 3]])
    after = keep_columns(x, second, reading)
    assert [piece.shape[1] for piece in after.tensors] == [2]
    for kept, columns in ((before, [0, 3]), (after, [3, 5]), (before, [0, 3])):
        assert torch.equal(given_back(kept), x[:, columns])


@given(readers(), st.data())
def test_the_same_readers_in_another_order_later(several: list[Rows], data: st.DataObject):
    structures = {place: built(rows) for place, rows in enumerate(several)}
    orders = data.draw(st.lists(st.permutations(list(structures)), min_size=2, max_size=4))
    earlier: list[tuple[Kept, Tensor]] = []
    for seed, order in enumerate(orders + orders[:1]):
        x, reading = normal(4, INPUTS, seed=seed), Reading()
        for place in order:
            expected = x[:, union(several[place])].clone()
            earlier.append((keep_columns(x, structures[place], reading), expected))
        assert sum(piece.shape[1] for piece in reading.pieces) == len(union(*several))
        # backwards may come after other forwards
        for kept, expected in earlier:
            assert torch.equal(given_back(kept), expected)


def test_index_tensors_are_derived_once_where_the_order_stays():
    structures = [built([[0, 3]]), built([[3], [5]]), built([[0, 7]])]
    seen = []
    for seed in range(3):
        x, reading = normal(4, INPUTS, seed=seed), Reading()
        for structure in structures:
            keep_columns(x, structure, reading)
        seen.append([id(columns) for columns in reading.columns])
    assert seen[0] == seen[1] == seen[2]


@given(readers(), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_copies_in_another_dtype(several: list[Rows], product: torch.dtype):
    x, reading = normal(4, INPUTS), Reading()
    for rows in several:
        kept = keep_columns(x, built(rows), reading, torch.bfloat16, product)
        assert {piece.dtype for piece in kept.tensors} == {torch.bfloat16}
        assert given_back(kept).dtype == product
        assert torch.equal(given_back(kept), x[:, union(rows)].to(torch.bfloat16).to(product))


def test_copies_do_not_change_with_the_original():
    x, reading, structures = normal(4, INPUTS), Reading(), [built([[0, 3]]), built([[3, 5], [0]])]
    before = x.clone()
    kept = [keep_columns(x, structure, reading) for structure in structures]
    x.zero_()
    assert torch.equal(given_back(kept[0]), before[:, [0, 3]])
    assert torch.equal(given_back(kept[1]), before[:, [0, 3, 5]])


@pytest.mark.parametrize("view", [lambda x: x.t().contiguous().t(), lambda x: x[:1].expand(4, INPUTS)])
def test_strided_inputs(view):
    x = view(normal(4, INPUTS))
    assert torch.equal(given_back(keep_columns(x, built([[1, 8]]), Reading())), x[:, [1, 8]])


def test_the_whole_input_is_kept_without_a_copy():
    x = normal(4, INPUTS)
    kept = keep_whole(x)
    (tensor,) = kept.tensors
    assert tensor.data_ptr() == x.data_ptr()
    assert torch.equal(given_back(kept), x)


@pytest.mark.parametrize("way", ["columns", "shared", "whole", "bfloat16"])
def test_gradients_are_the_same_whatever_is_kept(way: str):
    rows, other = [[0, 3], [], [3, 8]], [[8, 1]]
    x, weight, grad = normal(5, INPUTS), normal(3, INPUTS, seed=1), normal(5, 3, seed=3)
    values, reading = normal(4, seed=2).requires_grad_(), Reading()
    if way == "bfloat16":
        x = x.to(torch.bfloat16).float()  # so that nothing is lost
    if way == "shared":
        keep_columns(x, built([sorted(other[0])]), reading)
    dtype = torch.bfloat16 if way == "bfloat16" else None
    kept = keep_whole(x) if way == "whole" else keep_columns(x, built(rows), reading, dtype, x.dtype)
    sparse_linear(x, weight, values, None, built(rows), kept).backward(grad)
    expected = at_entries(grad.double().t() @ x.double(), rows)
    torch.testing.assert_close(values.grad.double(), expected, rtol=1e-5, atol=1e-5)


def test_readers_in_several_threads_find_what_they_have_derived():
    """What one derives, another may take out of the structure before it is used."""

    class TakenOut(dict):
        def __setitem__(self, key, value):
            super().__setitem__(key, value)
            self.clear()

    x, structure, reading = normal(4, INPUTS), built([[1, 8]]), Reading()
    keep_columns(x, built([[0, 8]]), reading)
    kept = keep_columns(x, replace(structure, shared=TakenOut()), reading)
    assert torch.equal(given_back(kept), x[:, [1, 8]])
