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
from tests.sparse import cases
from tests.sparse.cases import STRIDES, Rows, Selection, at_entries, union
from tests.support.helpers import normal, selections


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


def built(rows: Rows = ROWS, inputs: int = INPUTS) -> Structure:
    return cases.built(rows, inputs)


def operands(tokens: int, neurons: int = len(ROWS), inputs: int = INPUTS, dtype: torch.dtype = torch.float32):
    return normal(tokens, neurons).to(dtype), normal(tokens, inputs, seed=1).to(dtype)


def assert_right(found: tuple[Tensor, Tensor], grad: Tensor, x: Tensor, rows: Rows) -> None:
    """`x` has all columns; errors are measured against the sizes that are summed, not against their sum."""
    assert [tensor.dtype for tensor in found] == [torch.float32] * 2
    expected = at_entries(grad.double().t() @ x.double(), rows)
    size = at_entries(grad.double().abs().t() @ x.double().abs(), rows)
    assert found[0].shape == expected.shape
    assert bool(((found[0] - expected).abs() <= 1e-6 * size + 1e-30).all())
    assert found[1].shape == grad.shape[1:]
    assert bool(((found[1] - grad.double().sum(0)).abs() <= 1e-6 * grad.double().abs().sum(0) + 1e-30).all())


# --- the numbers ----------------------------------------------------------------------------------------------------


@needs_kernel
@given(selections(max_neurons=7, max_inputs=9), st.integers(0, 20), st.sampled_from(DTYPES), st.booleans())
def test_any_selection(selection: Selection, tokens: int, dtype: torch.dtype, whole: bool):
    inputs, rows = selection
    grad, x = operands(tokens, len(rows), inputs, dtype)
    where = built(rows, inputs)
    assert cpu.fits(grad, x, where)
    assert_right(cpu.sampled_product(grad, x if whole else x[:, union(rows)], where), grad, x, rows)


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


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)], ids=["grad", "inputs", "both"])
def test_any_strides(strides: str, which: tuple[int, ...], dtype: torch.dtype):
    grad, x = (STRIDES[strides](m) if i in which else m for i, m in enumerate(operands(70, dtype=dtype)))
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


def no_compiler(patch: pytest.MonkeyPatch) -> None:
    patch.delenv("CXX", raising=False)
    patch.setattr(shutil, "which", lambda *args, **options: None)


def no_folder_for_it(patch: pytest.MonkeyPatch) -> None:
    in_vain = partial(tempfile.TemporaryDirectory, dir="/no/such/folder")
    patch.setattr(cpu.tempfile, "TemporaryDirectory", in_vain)


SPOILED: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "broken compiler": lambda patch: patch.setenv("CXX", "/bin/false"),
    "absent compiler": lambda patch: patch.setenv("CXX", "/no/such/compiler"),
    "unreadable command": lambda patch: patch.setenv("CXX", "g++ 'no closing quote"),
    "no compiler": no_compiler,
    "a compiler that builds nothing": lambda patch: patch.setenv("CXX", "/bin/true"),
    "no folder for it": no_folder_for_it,
}


@pytest.mark.usefixtures("unbuilt")
@pytest.mark.parametrize("how", SPOILED)
def test_without_a_kernel_one_line_is_logged_and_training_goes_on(
    how: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
):
    SPOILED[how](monkeypatch)
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
    torch.testing.assert_close(values.grad, at_entries(dense.grad, ROWS), rtol=1e-4, atol=1e-4)


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
