"""Every way to the product at the selected entries, against a dense product in float64."""

from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from peft_fps.sparse import Layout, Structure, build_structure, products, sparse_linear
from peft_fps.sparse.kernels import cpu
from tests.sparse.cases import STRIDES, Rows, at_entries, built, leaves, union
from tests.support.helpers import normal, selections


Operands = tuple[Tensor, Tensor, Rows]

TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 0.02, "atol": 0.05},
    torch.float16: {"rtol": 0.002, "atol": 0.01},
}
FULL = [torch.float32, torch.float64]
ALL = list(TOLERANCE)


def naive(grad: Tensor, x: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Entries of the dense product, and the column sums; `x` has all columns."""
    return at_entries(grad.double().t() @ x.double(), rows), grad.double().sum(0)


def used_columns(x: Tensor, rows: Rows) -> Tensor:
    return x[:, union(rows)]


def assert_product(found: Tensor, expected: Tensor, tolerance: dict[str, float]) -> None:
    assert found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected, **tolerance)


@st.composite
def operands(draw: st.DrawFn, least_tokens: int = 0) -> Operands:
    """Gradient, all columns of the input, and the selected ones; rows may be uneven, empty or full."""
    inputs, rows = draw(selections())
    tokens, seed = draw(st.integers(least_tokens, 11)), draw(st.integers(0, 99))
    grad = STRIDES[draw(st.sampled_from(list(STRIDES)))](normal(tokens, len(rows), seed=seed))
    x = STRIDES[draw(st.sampled_from(list(STRIDES)))](normal(tokens, inputs, seed=seed + 100))
    return grad, x, rows


def cast(grad: Tensor, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return grad.to(dtype), x.to(dtype)  # strides are kept, except for expanded ones, which `.to` makes dense


# --- each way -------------------------------------------------------------------------------------------------------


@given(operands(), st.sampled_from(ALL), st.sampled_from([1, 5, 1 << 22]))
def test_product_by_columns(case: Operands, dtype: torch.dtype, product_elements: int):
    *both, rows = case
    grad, x = cast(*both, dtype)
    where = built(rows, x.shape[1], product_elements=product_elements)
    found = products.product_by_columns(grad, used_columns(x, rows), where)
    assert found.dtype == dtype
    assert_product(found, naive(grad, x, rows)[0], TOLERANCE[dtype])


@given(operands(least_tokens=1), st.sampled_from(FULL), st.sampled_from([1, 3, 4, 800]))
def test_product_by_dots(case: Operands, dtype: torch.dtype, tile: int):
    *both, rows = case
    grad, x = cast(*both, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "TILE_TOKENS", tile)
        found = products.product_by_dots(grad, used_columns(x, rows), built(rows, x.shape[1]))
    assert found.dtype == dtype
    assert_product(found, naive(grad, x, rows)[0], TOLERANCE[dtype])


@pytest.mark.parametrize("tokens", [799, 800, 801, 1700])
def test_dots_over_more_tokens_than_a_tile(tokens: int):
    rows = [[0, 3, 5], [], [2], [0, 1, 2, 3, 4, 5]]
    grad, x = normal(tokens, 4, dtype=torch.float64), normal(tokens, 6, seed=1, dtype=torch.float64)
    found = products.product_by_dots(grad, x, built(rows, 6))
    assert_product(found, naive(grad, x, rows)[0], {"rtol": 1e-11, "atol": 1e-11})


# --- the choice between them ----------------------------------------------------------------------------------------


WAYS = {"any": {}, "without the kernel": {"kernel": False}}
WAYS |= {f"by {way}": {"kernel": False, "dots": way == "dots"} for way in ("columns", "dots")}


def choose(patch: pytest.MonkeyPatch, kernel: bool = True, dots: bool | None = None) -> None:
    patch.setenv(cpu.SWITCH, "1" if kernel else "0")
    if kernel:
        patch.setattr(products, "entries_are_few", lambda structure: True)
    if dots is not None:
        patch.setattr(products, "dots_are_cheaper", lambda structure: dots)


@pytest.mark.parametrize("way", list(WAYS))
@given(operands(), st.sampled_from(ALL), st.booleans())
def test_sampled_product(way: str, case: Operands, dtype: torch.dtype, whole: bool):
    *both, rows = case
    grad, x = cast(*both, dtype)
    with pytest.MonkeyPatch.context() as patch:
        choose(patch, **WAYS[way])
        found, sums = products.sampled_product(grad, x if whole else used_columns(x, rows), built(rows, x.shape[1]))
    expected, expected_sums = naive(grad, x, rows)
    for tensor in (found, sums):
        assert tensor.dtype in (dtype, torch.float32)
    assert_product(found, expected, TOLERANCE[dtype])
    assert_product(sums, expected_sums, TOLERANCE[dtype])


@pytest.mark.parametrize("way", list(WAYS))
def test_expanded_gradients_as_those_of_a_sum(way: str, monkeypatch: pytest.MonkeyPatch):
    rows, x = [[0, 3], [], [1, 2, 3]], normal(7, 4)
    choose(monkeypatch, **WAYS[way])
    for grad in (torch.ones(()).expand(7, 3), normal(3).expand(7, 3), normal(7, 1).expand(7, 3)):
        found, sums = products.sampled_product(grad, x, built(rows, 4))
        assert_product(found, naive(grad, x, rows)[0], TOLERANCE[torch.float32])
        assert_product(sums, naive(grad, x, rows)[1], TOLERANCE[torch.float32])


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_without_tokens_or_entries(way: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    choose(monkeypatch, **WAYS[way])
    for tokens, rows in ((0, [[0, 2], [], [1]]), (5, [[], [], []]), (0, [[], [], []])):
        grad, x = cast(normal(tokens, 3), normal(tokens, 4, seed=1), dtype)
        for inputs in (x, used_columns(x, rows)):
            found, sums = products.sampled_product(grad, inputs, built(rows, 4))
            assert found.tolist() == [0] * sum(map(len, rows))
            assert_product(sums, grad.double().sum(0), TOLERANCE[dtype])


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("dtype", FULL, ids=str)
def test_repetition_gives_the_same_bits(way: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    choose(monkeypatch, **WAYS[way])
    rows = [sorted({(7 * row + 3 * i) % 40 for i in range(row % 9)}) for row in range(50)]
    grad, x = cast(normal(900, 50), normal(900, 40, seed=1), dtype)
    first = products.sampled_product(grad, x, built(rows, 40))
    for inputs in (x, x.clone()):
        again = products.sampled_product(grad.clone(), inputs, built(rows, 40))
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.parametrize(
    ("neurons", "inputs", "per_neuron", "dots"),
    [(8, 8, 2, False), (3000, 16, 2, False), (16, 3000, 200, False), (400, 400, 400, False), (1, 50, 50, False)]
    + [(1024, 1024, 4, True), (3072, 768, 16, True)],
)
def test_dots_are_for_large_unions(neurons: int, inputs: int, per_neuron: int, dots: bool):
    step = max(inputs // per_neuron, 1)
    rows = [sorted({(row + step * i) % inputs for i in range(per_neuron)}) for row in range(neurons)]
    assert products.dots_are_cheaper(built(rows, inputs)) is dots


@pytest.mark.parametrize(
    ("neurons", "inputs", "per_neuron", "few"),
    [(8, 8, 8, False), (400, 400, 400, False), (400, 400, 100, False), (400, 400, 4, True), (1, 50, 50, False)],
)
def test_kernels_are_for_few_entries(neurons: int, inputs: int, per_neuron: int, few: bool):
    rows = [sorted({(row + i) % inputs for i in range(per_neuron)}) for row in range(neurons)]
    assert products.entries_are_few(built(rows, inputs)) is few


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("dots", [True, False], ids=["dots", "columns"])
def test_the_way_that_was_chosen_is_taken(dtype: torch.dtype, dots: bool, monkeypatch: pytest.MonkeyPatch):
    choose(monkeypatch, kernel=False, dots=dots)
    by_columns, by_dots = Mock(wraps=products.product_by_columns), Mock(wraps=products.product_by_dots)
    monkeypatch.setattr(products, "product_by_columns", by_columns)
    monkeypatch.setattr(products, "product_by_dots", by_dots)
    products.sampled_product(*cast(normal(3, 2), normal(3, 4, seed=1), dtype), built([[0, 3], [1]], 4))
    # half precision has no dots along the tokens
    assert (by_columns.call_count, by_dots.call_count) == ((0, 1) if dots and dtype in FULL else (1, 0))


# --- few tokens -----------------------------------------------------------------------------------------------------


def random_change(neurons: int, inputs: int, density: float, transposed: bool) -> tuple[Tensor, Structure, Tensor]:
    chosen = torch.rand(neurons, inputs) < density
    delta = torch.randn(neurons, inputs) * chosen
    columns, counts = chosen.nonzero()[:, 1], chosen.sum(1)
    return delta, build_structure(columns, counts, neurons, inputs, Layout(transposed)), delta[chosen]


class LargestResult(TorchDispatchMode):
    """Notes the largest number of elements that any operation returns, views of one tensor left out."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.elements, self.memory = 0, tensor.untyped_storage().data_ptr()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() != self.memory:
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("density", [0.05, 0.4])
def test_the_change_beside_the_base_product(tokens: int, transposed: bool, density: float):
    delta, structure, values = random_change(40, 30, density, transposed)
    x, g, onto = torch.randn(tokens, 30), torch.randn(tokens, 40), torch.randn(tokens, 30)
    torch.testing.assert_close(products.added_product(x, values, structure), x @ delta.t())
    expected = onto + g @ delta
    products.add_input_gradient(onto, g, values, structure)
    torch.testing.assert_close(onto, expected)


@pytest.mark.cpu
@pytest.mark.parametrize("transposed", [False, True])
def test_few_tokens_leave_the_weight_uncopied_and_give_the_same_gradients(transposed: bool):
    delta, structure, values = random_change(64, 48, 0.1, transposed)
    weight, bias, x, g = torch.randn(64, 48), torch.randn(64), torch.randn(2, 48), torch.randn(2, 64)
    stored = weight.t().contiguous() if transposed else weight.clone()
    tensors = leaves(x, values, bias)
    assert products.adding_is_cheaper(x, stored, values, structure)
    with LargestResult(stored) as largest:
        result = sparse_linear(tensors[0], stored, tensors[1], tensors[2], structure)
        result.backward(g)
    assert largest.elements < weight.numel()
    dense = leaves(x, delta, bias)
    expected = dense[0] @ (weight + dense[1]).t() + dense[2]
    expected.backward(g)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(tensors[0].grad, dense[0].grad)
    torch.testing.assert_close(tensors[1].grad, dense[1].grad[delta != 0])
    torch.testing.assert_close(tensors[2].grad, dense[2].grad)
