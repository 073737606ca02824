"""The Triton kernel, against a naive product in float64: on a CUDA device, and on the CPU in Triton's interpreter.

The interpreter must be chosen before Triton is imported, hence one test runs those of this file in a new process.
"""

import logging
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peft_fps.sparse import Structure, build_structure, products
from peft_fps.sparse.kernels import cuda
from tests.support.helpers import ROOT, csr, normal, selections


OLDEST = "3.7"  # the interpreters of older ones fail with recent versions of NumPy
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
MANY = cuda.BLOCK_NEURONS + 3
ROWS = {
    "even": [[n % 5, 5 + n % 4] for n in range(MANY)],
    "uneven": [list(range(n % 3, 20 if n == 1 else n % 4)) for n in range(MANY)],
    "first and last empty": [[], [1], [0, 6], []],
    "whole fan-in": [list(range(7))] * 3,
    "one neuron": [[2, 3]],
    "one entry": [[], [], [4]],
    "none": [[], []],
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

pytestmark = pytest.mark.cuda
runs = pytest.mark.skipif(
    not (INTERPRETED or (torch.cuda.is_available() and find_spec("triton"))),
    reason="needs a CUDA device and Triton; without the device, runs in test_in_the_interpreter",
)


def operands(
    rows: list[list[int]], inputs: int, tokens: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Structure]:
    """Gradient `(tokens, neurons)`, all columns of the input `(tokens, inputs)`, and the structure."""
    grad, x = normal(tokens, len(rows), seed=1, dtype=dtype), normal(tokens, inputs, seed=2, dtype=dtype)
    columns, row_counts = csr(rows)
    structure = build_structure(columns.to(DEVICE), row_counts.to(DEVICE), len(rows), inputs)
    return grad.to(DEVICE), x.to(DEVICE), structure


def check(grad: Tensor, x: Tensor, structure: Structure, rows: list[list[int]], all_columns: Tensor) -> None:
    values, sums = cuda.sampled_product(grad, x, structure)
    expected = [(grad[:, n].double() * all_columns[:, c].double()).sum() for n, row in enumerate(rows) for c in row]
    assert values.dtype == sums.dtype == torch.float32
    assert values.shape == structure.positions.shape
    torch.testing.assert_close(values.double(), torch.stack([*expected, values.new_zeros(()).double()])[:-1], **NEAR)
    torch.testing.assert_close(sums.double(), grad.double().sum(0), **NEAR)


NEAR: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-4}  # sums of up to 700 products of size 1 in float32


@runs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_product_is_right(rows: list[list[int]], dtype: torch.dtype) -> None:
    grad, x, structure = operands(rows, 20, cuda.BLOCK_TOKENS + 5, dtype)
    check(grad, x, structure, rows, x)
    check(grad, x.index_select(1, structure.union), structure, rows, x)


@runs
@settings(max_examples=10)  # interpreted, they are slow
@given(selection=selections(), tokens=st.integers(1, 70))
def test_product_of_any_selection_is_right(selection: tuple[int, list[list[int]]], tokens: int) -> None:
    inputs, rows = selection
    grad, x, structure = operands(rows, inputs, tokens)
    check(grad, x, structure, rows, x)
    check(grad, x.index_select(1, structure.union), structure, rows, x)


@runs
@pytest.mark.parametrize("tokens", [cuda.TOKENS_PER_PROGRAM + 1, 700])
def test_product_of_tokens_shared_among_programs_is_right_and_repeats(tokens: int) -> None:
    rows = ROWS["even"]
    grad, x, structure = operands(rows, 9, tokens)
    check(grad, x, structure, rows, x)
    for first, second in zip(*(cuda.sampled_product(grad, x, structure) for _ in range(2)), strict=True):
        assert torch.equal(first, second)


@runs
@pytest.mark.parametrize(("programs", "elements"), [(1, 1 << 22), (1 << 9, 1)])
def test_product_without_shares_is_right(programs: int, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "PROGRAMS", programs)
    monkeypatch.setattr(cuda, "PRODUCT_ELEMENTS", elements)
    grad, x, structure = operands(ROWS["even"], 9, 600)
    check(grad, x, structure, ROWS["even"], x)


@runs
def test_product_of_operands_with_any_strides_is_right() -> None:
    rows = ROWS["even"]
    grad, x, structure = operands(rows, 9, 70)
    transposed = [tensor.t().contiguous().t() for tensor in (grad, x)]
    apart = [torch.stack([tensor, tensor + 1], -1)[..., 0] for tensor in (grad, x)]
    for strided_grad, strided_x in (transposed, apart):
        assert not strided_grad.is_contiguous()
        check(strided_grad, strided_x, structure, rows, x)
    check(grad[:1, :1].expand(70, len(rows)), x[:1].expand(70, 9), structure, rows, x[:1].expand(70, 9))


@runs
def test_product_takes_long_indices() -> None:
    grad, x, structure = operands(ROWS["uneven"], 20, 9)
    long = replace(
        structure,
        row_starts=structure.row_starts.to(torch.int64),
        union_positions=structure.union_positions.to(torch.int64),
    )
    check(grad, x, long, ROWS["uneven"], x)


@runs
def test_product_keeps_what_is_not_finite_to_its_entries() -> None:
    rows = [[0, 2], [1], [0]]
    grad, x, structure = operands(rows, 3, 40)
    grad[3, 1], x[5, 2] = float("nan"), float("inf")
    values, sums = cuda.sampled_product(grad, x, structure)
    assert values.isfinite().tolist() == [True, False, False, True]
    assert sums.isfinite().tolist() == [True, False, True]


@runs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_product_is_tried_on_a_tiny_one(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_tried", {})
    assert cuda.works(torch.ones(1, device=DEVICE).device, dtype)


@pytest.mark.skipif(INTERPRETED, reason="in the interpreter already")
def test_in_the_interpreter() -> None:
    pytest.importorskip("triton", minversion=OLDEST, reason=f"needs Triton {OLDEST}: its interpreter runs the kernel")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "test_product", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("real", ["fp32", "bf16", "fp16"])
def test_compiles_where_there_is_no_device(
    real: str, tmp_path: os.PathLike[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter runs whatever Python runs; the compiler is stricter."""
    triton = pytest.importorskip("triton", minversion=OLDEST, reason=f"needs Triton {OLDEST}, to compile the kernel")
    compiler = pytest.importorskip("triton.compiler")
    backends = pytest.importorskip("triton.backends.compiler")
    if "nvidia" not in triton.backends.backends:
        pytest.skip("this Triton is built without a compiler for CUDA")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = cuda.compiled()
    constants = {"ALL_COLUMNS": True, "BLOCK_TOKENS": cuda.BLOCK_TOKENS, "BLOCK_NEURONS": cuda.BLOCK_NEURONS}
    pointers = [f"*{real}", f"*{real}", "*i32", "*i32", "*i64", "*fp32", "*fp32"]
    numbers = ["i32"] * (len(kernel.arg_names) - len(pointers) - len(constants))
    kinds = [*pointers, *numbers, *["constexpr"] * len(constants)]
    source = compiler.ASTSource(kernel, dict(zip(kernel.arg_names, kinds, strict=True)), constants)
    target = backends.GPUTarget("cuda", 80, 32)
    assert triton.compile(source, target=target, options={"enable_fp_fusion": True}).asm["ptx"]


@pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_one_of_three_ways_on_a_device(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="needs Triton")
    grad, x, structure = operands(ROWS["uneven"], 20, 700, dtype)
    ways = {}

    def choose(key: Any, candidates: Any) -> str:
        ways.update({name: candidate() for name, candidate in candidates.items()})
        return "Triton kernel"

    by_kernel = products.measured_product(grad, x, structure, choose)
    assert len(ways) == 3
    assert by_kernel[0].dtype == torch.float32
    for way in (*ways.values(), products.sampled_product(grad, x, structure)):
        for number, other in zip(by_kernel, way, strict=True):
            torch.testing.assert_close(number, other.float(), rtol=2e-2, atol=1e-1)
    monkeypatch.setenv(cuda.SWITCH, "0")
    assert not cuda.fits(grad, x, structure)


# --- when it is taken; no device is needed to tell -------------------------------------------------------------------


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process in which the kernel has not been tried, with the switch as it is by default."""
    monkeypatch.setattr(cuda, "_tried", {})
    monkeypatch.delenv(cuda.SWITCH, raising=False)
    compiled = cuda.compiled
    compiled.cache_clear()
    yield
    compiled.cache_clear()


def fits(device: str = "cuda:0", grad: torch.dtype = torch.float32, inputs: torch.dtype | None = None) -> bool:
    operands: list[Any] = [
        SimpleNamespace(device=torch.device(device), dtype=dtype) for dtype in (grad, inputs or grad)
    ]
    return cuda.fits(*operands, build_structure(*csr([[0]]), 1, 1))


@pytest.mark.usefixtures("untried")
def test_fits_only_what_it_can_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_try", lambda device, dtype: None)
    assert all(fits(grad=dtype) for dtype in DTYPES)
    assert not fits("cpu")
    assert not fits(grad=torch.float64)
    assert not fits(inputs=torch.bfloat16)
    monkeypatch.setenv(cuda.SWITCH, "0")  # read at every call
    assert not fits()
    monkeypatch.setenv(cuda.SWITCH, "1")
    assert fits()


@pytest.mark.usefixtures("untried")
def test_without_triton_says_so_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with caplog.at_level(logging.DEBUG, cuda.logger.name):
        assert not any(fits(device, dtype) for device in ("cuda:0", "cuda:1") for dtype in DTYPES)
    assert [(record.levelno, "no Triton kernel" in record.message) for record in caplog.records] == [
        (logging.DEBUG, True)
    ]


@pytest.mark.usefixtures("untried")
@pytest.mark.parametrize("error", [RuntimeError("no C compiler"), None])
def test_failing_or_wrong_it_is_not_taken(
    error: Exception | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def product(grad: Tensor, inputs: Tensor, structure: Structure) -> tuple[Tensor, Tensor]:
        if error is not None:
            raise error
        return torch.zeros(3), torch.zeros(2)

    monkeypatch.setattr(cuda, "compiled", lambda: None)
    monkeypatch.setattr(cuda, "sampled_product", product)
    with caplog.at_level(logging.DEBUG, cuda.logger.name):
        assert not cuda.works(torch.device("cpu"), torch.float32)
        assert not cuda.works(torch.device("cpu"), torch.bfloat16)
    assert len(caplog.records) == 1
    assert ("no C compiler" if error else "wrong numbers") in caplog.text


def test_is_imported_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "tl" not in runpy.run_path(cuda.__file__)
