"""The compiled CPU kernel against a dense product in float64, and what happens where it cannot be built."""

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from peft_fps.sparse import Structure, build_structure, products, sparse_linear
from peft_fps.sparse.kernels import cpu
from tests.support.helpers import csr, normal, selections


needs_kernel = pytest.mark.skipif(cpu.library() is None, reason="no C++ compiler that builds the kernel")

DTYPES = [torch.float32, torch.bfloat16]  # sums are formed in float32 for both
ROWS, INPUTS = [[0, 3, 4, 5, 6, 8], [], [2], [0, 1, 2, 3, 4, 5, 6, 7, 8], [8], [1, 2, 3, 4]], 9


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def unbuilt() -> Iterator[None]:
    """The kernel is to be built again, now and after the test."""
    cpu.library.cache_clear()
    yield
    cpu.library.cache_clear()


def built(rows: list[list[int]] = ROWS, inputs: int = INPUTS) -> Structure:
    return build_structure(*csr(rows), len(rows), inputs)


def operands(tokens: int, neurons: int = len(ROWS), inputs: int = INPUTS, dtype: torch.dtype = torch.float32):
    return normal(tokens, neurons).to(dtype), normal(tokens, inputs, seed=1).to(dtype)


def assert_right(found: tuple[Tensor, Tensor], grad: Tensor, x: Tensor, rows: list[list[int]]) -> None:
    """`x` has all columns; errors are measured against the sizes that are summed, not against their sum."""
    assert [tensor.dtype for tensor in found] == [torch.float32] * 2
    places = [(row, column) for row, columns in enumerate(rows) for column in columns]
    dense, size = grad.double().t() @ x.double(), grad.double().abs().t() @ x.double().abs()
    expected = [torch.tensor([part[place] for place in places], dtype=torch.float64) for part in (dense, size)]
    assert found[0].shape == expected[0].shape
    assert bool(((found[0] - expected[0]).abs() <= 1e-6 * expected[1] + 1e-30).all())
    assert found[1].shape == grad.shape[1:]
    assert bool(((found[1] - grad.double().sum(0)).abs() <= 1e-6 * grad.double().abs().sum(0) + 1e-30).all())


# --- the numbers ----------------------------------------------------------------------------------------------------


@needs_kernel
@given(selections(max_neurons=7, max_inputs=9), st.integers(0, 20), st.sampled_from(DTYPES), st.booleans())
def test_any_selection(selection: tuple[int, list[list[int]]], tokens: int, dtype: torch.dtype, whole: bool):
    inputs, rows = selection
    grad, x = operands(tokens, len(rows), inputs, dtype)
    where = built(rows, inputs)
    assert cpu.fits(grad, x, where)
    used = x[:, sorted({column for row in rows for column in row})]
    assert_right(cpu.sampled_product(grad, x if whole else used, where), grad, x, rows)


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 63, 64, 128, 255, 256, 257, 511, 513, 1000])
def test_tiles_and_threads(tokens: int, dtype: torch.dtype, threads: int):
    grad, x = operands(tokens, dtype=dtype)
    found = cpu.sampled_product(grad, x, built())
    assert_right(found, grad, x, ROWS)
    for _ in range(3):
        again = cpu.sampled_product(grad, x, built())
        assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


@needs_kernel
@pytest.mark.parametrize("neurons", [1, 255, 256, 257, 600])
def test_more_neurons_than_are_laid_out_at_once(neurons: int, threads: int):
    rows = [sorted({(3 * row + 5 * i) % 31 for i in range(row % 8)}) for row in range(neurons - 1)] + [[0, 30]]
    grad, x = operands(300, neurons, 31)
    assert_right(cpu.sampled_product(grad, x, built(rows, 31)), grad, x, rows)


LAYOUTS = {
    "transposed": lambda matrix: matrix.t().contiguous().t(),
    "strided-columns": lambda matrix: matrix.repeat_interleave(2, 1)[:, ::2],
    "strided-tokens": lambda matrix: matrix.repeat_interleave(3, 0)[::3],
    "part-of-a-row": lambda matrix: torch.cat([matrix, matrix], 1)[:, matrix.shape[1] :],
    "one-token": lambda matrix: matrix[:1].expand_as(matrix),
    "one-column": lambda matrix: matrix[:, :1].expand_as(matrix),
    "one-number": lambda matrix: matrix[:1, :1].expand_as(matrix),
}


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)], ids=["grad", "inputs", "both"])
def test_any_layout(layout: str, which: tuple[int, ...], dtype: torch.dtype):
    grad, x = (LAYOUTS[layout](m) if i in which else m for i, m in enumerate(operands(70, dtype=dtype)))
    assert_right(cpu.sampled_product(grad, x, built()), grad, x, ROWS)


@needs_kernel
def test_columns_that_nobody_reads_are_not_read():
    rows, (grad, x) = [[0, 5], [], [5], [7], [], [0]], operands(70)
    x[:, [1, 2, 3, 4, 6, 8]] = torch.nan
    found = cpu.sampled_product(grad, x, built(rows))
    assert_right(found, grad, x.nan_to_num(), rows)


# --- when it is taken -----------------------------------------------------------------------------------------------


@needs_kernel
def test_what_it_does_not_take():
    grad, x = operands(5)
    assert cpu.fits(grad, x, built())
    for dtype in (torch.float16, torch.float64):
        assert not cpu.fits(grad.to(dtype), x.to(dtype), built())
    assert not cpu.fits(grad, x.to(torch.bfloat16), built())
    assert not cpu.fits(grad.to("meta"), x.to("meta"), built())
    wide = build_structure(torch.tensor([0, 2**31]), torch.tensor([2]), 1, 2**31 + 1)
    assert not cpu.fits(grad[:, :1], x[:, :2], wide)


@needs_kernel
@pytest.mark.parametrize(
    ("value", "taken"), [("1", True), ("", True), ("0", False), (" Off ", False), ("FALSE", False), ("no", False)]
)
def test_the_switch(value: str, taken: bool, monkeypatch: pytest.MonkeyPatch):
    def refuse(*args: object) -> None:
        raise AssertionError("the kernel was called")

    (grad, x), where = operands(5), built()
    monkeypatch.delenv(cpu.SWITCH, raising=False)
    monkeypatch.setattr(products, "entries_are_few", lambda structure: True)
    expected = products.sampled_product(grad, x, where)
    monkeypatch.setattr(cpu, "sampled_product", refuse)
    monkeypatch.setenv("PEFT_FPS_CPU_KERNEL", value)
    if taken:
        with pytest.raises(AssertionError, match="the kernel was called"):
            products.sampled_product(grad, x, where)
    else:
        torch.testing.assert_close(products.sampled_product(grad, x, where), expected)


# --- building -------------------------------------------------------------------------------------------------------


def broken_compiler(patch: pytest.MonkeyPatch) -> None:
    patch.setenv("CXX", "/bin/false")


def absent_compiler(patch: pytest.MonkeyPatch) -> None:
    patch.setenv("CXX", "/no/such/compiler")


def unreadable_command(patch: pytest.MonkeyPatch) -> None:
    patch.setenv("CXX", "g++ 'no closing quote")


def no_compiler(patch: pytest.MonkeyPatch) -> None:
    patch.delenv("CXX", raising=False)
    patch.setattr(shutil, "which", lambda *args, **options: None)


def a_compiler_that_builds_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setenv("CXX", "/bin/true")


def no_folder_for_it(patch: pytest.MonkeyPatch) -> None:
    in_vain = partial(tempfile.TemporaryDirectory, dir="/no/such/folder")
    patch.setattr(cpu.tempfile, "TemporaryDirectory", in_vain)


@pytest.mark.usefixtures("unbuilt")
@pytest.mark.parametrize(
    "spoil",
    [
        broken_compiler,
        absent_compiler,
        unreadable_command,
        no_compiler,
        a_compiler_that_builds_nothing,
        no_folder_for_it,
    ],
    ids=lambda spoil: spoil.__name__,
)
def test_without_a_kernel_one_line_is_logged_and_training_goes_on(
    spoil: Callable[[pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
):
    spoil(monkeypatch)
    monkeypatch.setattr(products, "entries_are_few", lambda structure: True)
    monkeypatch.delenv(cpu.SWITCH, raising=False)
    weight, x, values = normal(6, INPUTS), normal(70, INPUTS, seed=1), normal(21, seed=2).requires_grad_()
    dense = torch.zeros(6, INPUTS)
    for place, (row, column) in enumerate((row, column) for row, columns in enumerate(ROWS) for column in columns):
        dense[row, column] = values[place].item()
    dense = (dense + weight).requires_grad_()
    with caplog.at_level(logging.DEBUG, "peft_fps"):
        for _ in range(2):
            values.grad = None
            sparse_linear(x, weight, values, None, built()).square().sum().backward()
    (record,) = [record for record in caplog.records if record.name.startswith("peft_fps")]
    assert record.levelno == logging.DEBUG
    assert cpu.library() is None
    assert capfd.readouterr() == ("", "")
    (x @ dense.t()).square().sum().backward()
    expected = torch.cat([dense.grad[row, columns] for row, columns in enumerate(ROWS)])
    torch.testing.assert_close(values.grad, expected, rtol=1e-4, atol=1e-4)


@needs_kernel
@pytest.mark.usefixtures("unbuilt")
def test_building_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu.tempfile, "TemporaryDirectory", partial(tempfile.TemporaryDirectory, dir=tmp_path))
    source = sorted(os.listdir(cpu.SOURCE.parent))
    assert cpu.library() is cpu.library()
    assert list(tmp_path.iterdir()) == []
    assert sorted(os.listdir(cpu.SOURCE.parent)) == source
    grad, x = operands(5)
    assert_right(cpu.sampled_product(grad, x, built()), grad, x, ROWS)
