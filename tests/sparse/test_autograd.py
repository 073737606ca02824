"""Products with W + ΔW and their gradients, against autograd through a dense W + ΔW."""

from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from peft_fps.sparse import (
    Reading,
    Structure,
    autograd,
    compose_weight,
    convolution_autograd,
    keep_columns,
    keep_whole,
    sparse_delta_linear,
    sparse_linear,
)
from peft_fps.sparse import products as ways
from tests.sparse import cases
from tests.sparse.cases import (
    INPUTS,
    KINDS,
    ROWS,
    Rows,
    Selection,
    assert_same_function,
    at_entries,
    dense,
    leaves,
    products,
    saved_tensors,
)
from tests.support.helpers import bits, normal, selections


LEADING = [(), (4,), (2, 3), (2, 1, 3)]


def built(rows: Rows = ROWS, inputs: int = INPUTS, **options: Any) -> Structure:
    return cases.built(rows, inputs, **options)


# --- linear ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "transposed"])
@given(selections(), st.sampled_from(LEADING), st.booleans(), st.sampled_from([1, 6, 1 << 22]))
def test_sparse_linear(
    transposed: bool, selection: Selection, leading: tuple[int, ...], bias: bool, product_elements: int
):
    inputs, rows = selection
    weight = normal(*((inputs, len(rows)) if transposed else (len(rows), inputs)), dtype=torch.float64)
    x, values = normal(*leading, inputs, seed=1), normal(sum(map(len, rows)), seed=2)
    arguments = [x.double(), values.double()] + ([normal(len(rows), seed=3).double()] if bias else [])
    where = built(rows, inputs, transposed=transposed, product_elements=product_elements)
    assert_same_function(
        lambda x, values, b=None: sparse_linear(x, weight, values, b, where),
        lambda x, values, b=None: F.linear(x, dense(weight, values, rows, inputs, transposed), b),
        *arguments,
    )


@given(selections(), st.sampled_from(LEADING), st.sampled_from([1, 6, 1 << 22]))
def test_sparse_delta_linear(selection: Selection, leading: tuple[int, ...], product_elements: int):
    inputs, rows = selection
    none = torch.zeros(len(rows), inputs, dtype=torch.float64)
    where = built(rows, inputs, product_elements=product_elements)
    assert_same_function(
        lambda x, values: sparse_delta_linear(x, values, where),
        lambda x, values: F.linear(x, dense(none, values, rows, inputs)),
        normal(*leading, inputs, seed=1).double(),
        normal(sum(map(len, rows)), seed=2).double(),
    )


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda: normal(3, 2 * INPUTS)[:, ::2], id="strided-columns"),
        pytest.param(lambda: normal(INPUTS, 3).t(), id="transposed"),
        pytest.param(lambda: normal(4, 3, INPUTS).transpose(0, 1), id="swapped-tokens"),
        pytest.param(lambda: normal(1, INPUTS).expand(3, INPUTS), id="expanded"),
    ],
)
@pytest.mark.parametrize("contiguous_weight", [True, False], ids=["", "strided-weight"])
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "transposed"])
def test_non_contiguous_tensors(view: Callable[[], Tensor], contiguous_weight: bool, transposed: bool):
    weight = normal(5, INPUTS) if contiguous_weight else normal(INPUTS, 5).t()
    stored, where = weight.t() if transposed else weight, built(transposed=transposed)
    x, (left, right) = view(), leaves(normal(12, seed=2), normal(12, seed=2))
    whole = dense(weight.contiguous(), right, ROWS, INPUTS)
    found, expected = sparse_linear(x, stored, left, None, where), F.linear(x, whole)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(sparse_delta_linear(x, left, where), F.linear(x, whole - weight))
    # the gradient that arrives may be strided, too
    grad = normal(*expected.shape[::-1]).permute(*range(expected.dim())[::-1])
    found.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(left.grad, right.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.float32, None], ids=["float32-weight", "half-weight"])
def test_half_precision_products(dtype: torch.dtype, weight_dtype: torch.dtype | None):
    weight, x = normal(5, INPUTS).to(weight_dtype or dtype), normal(7, INPUTS, seed=1).to(dtype)
    bias = normal(5, seed=3).to(dtype)
    (values,) = leaves(0.1 * normal(12, seed=2))
    result = sparse_linear(x, weight, values, bias, built())
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 8 * torch.finfo(dtype).eps}
    (exact_values,) = leaves(values)
    expected = F.linear(x.float(), dense(weight.float(), exact_values, ROWS, INPUTS), bias.float())
    assert result.dtype == dtype
    torch.testing.assert_close(result.float(), expected, **tolerance)
    result.sum().backward()
    expected.sum().backward()
    assert values.grad is not None
    assert values.grad.dtype == torch.float32
    torch.testing.assert_close(values.grad, exact_values.grad, **tolerance)


def test_autocast_leaves_the_dtype_to_the_input():
    weight, x, values = normal(5, INPUTS), normal(7, INPUTS, seed=1), normal(12, seed=2).requires_grad_()
    plain = sparse_linear(x, weight, values, None, built())
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        inside = sparse_linear(x, weight, values, None, built())
        beside = sparse_delta_linear(x, values, built())
        inside.sum().backward()
    assert torch.equal(inside, plain)
    assert beside.dtype == torch.float32
    (expected,) = torch.autograd.grad(plain.sum(), values)
    assert torch.equal(values.grad, expected)


# --- what holds for all of them -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "transposed", "delta"])
@pytest.mark.parametrize("shape", [(0, INPUTS), (2, 0, INPUTS)], ids=str)
def test_no_tokens_at_all(kind: str, shape: tuple[int, ...]):
    function, _, (_, values, bias), _ = products(2, 3)[kind]
    x, values, bias = leaves(torch.zeros(shape, dtype=torch.float64), values, bias)
    result = function(x, values, bias)
    assert result.shape == (*shape[:-1], len(ROWS))
    result.sum().backward()
    assert x.grad.shape == shape
    assert not values.grad.any()
    assert not bias.grad.any()


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str):
    function, _, arguments, _ = products(2, 3)[kind]
    assert torch.autograd.gradcheck(function, leaves(*arguments), fast_mode=True)


@pytest.mark.parametrize("kind", ["linear", "conv", "transposed conv"])
@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_gradients_only_where_they_are_needed(kind: str, wanted: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch):
    function, _, arguments, weight = products(2, 3)[kind]
    weight.requires_grad_()
    arguments = [tensor.requires_grad_(need) for tensor, need in zip(arguments, wanted, strict=True)]
    result = function(*arguments)
    composed, sampled = Mock(wraps=compose_weight), Mock(wraps=autograd.sampled_product)
    of_kernel = Mock(wraps=convolution_autograd.weight_gradient)
    monkeypatch.setattr(autograd, "compose_weight", composed)
    monkeypatch.setattr(autograd, "sampled_product", sampled)
    monkeypatch.setattr(convolution_autograd, "compose_weight", composed)
    monkeypatch.setattr(convolution_autograd, "weight_gradient", of_kernel)
    result.sum().backward()
    assert [tensor.grad is not None for tensor in arguments] == list(wanted)
    assert weight.grad is None
    need_x, need_values, _ = wanted
    assert composed.called == need_x
    assert (sampled.called or of_kernel.called) == need_values


def test_without_a_gradient_to_come_nothing_is_saved():
    with saved_tensors() as kept:
        for function, _, arguments, _ in products(2, 3).values():
            assert not function(*arguments).requires_grad
    assert kept == []


@pytest.mark.parametrize("leading", [(50,), (10, 5)], ids=str)
@pytest.mark.parametrize("train_values", [True, False], ids=["values", "frozen-values"])
def test_linear_saves_the_weight_itself_and_the_used_columns_only(leading: tuple[int, ...], train_values: bool):
    rows, inputs = [[2, 17], [17], [], [2, 30]] * 10, 40  # 40 neurons read three columns
    weight, values = normal(40, inputs), normal(50, seed=2).requires_grad_(train_values)
    x = normal(*leading, inputs, seed=1).requires_grad_()
    with saved_tensors() as kept:
        sparse_linear(x, weight, values, normal(40, seed=3), built(rows, inputs))
    # all tokens of three columns, the weight and the values
    assert sorted(tensor.numel() for tensor in kept) == sorted([50 * 3] * train_values + [40 * inputs, 50])
    (saved_weight,) = [tensor for tensor in kept if tensor.shape == weight.shape]
    assert saved_weight.data_ptr() == weight.data_ptr()


def test_delta_linear_saves_the_used_columns_and_no_weight():
    rows, inputs = [[2, 17], [17], [], [2, 30]] * 10, 40
    with saved_tensors() as kept:
        sparse_delta_linear(
            normal(50, inputs).requires_grad_(), normal(50, seed=2).requires_grad_(), built(rows, inputs)
        )
    assert sorted(tensor.numel() for tensor in kept) == [50, 50 * 3]


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_for_the_weight_whose_bytes_stay(kind: str):
    function, _, arguments, weight = products(2, 3)[kind]
    weight.requires_grad_()
    before = bits(weight)
    function(*leaves(*arguments)).sum().backward()
    assert weight.grad is None
    assert bits(weight) == before


@pytest.mark.parametrize("kind", KINDS)
def test_functional_gradients(kind: str):
    function, _, arguments, _ = products(2, 3)[kind]
    found = torch.func.grad(lambda x, v, b: function(x, v, b).square().sum(), argnums=(0, 1, 2))(*arguments)
    expected = leaves(*arguments)
    function(*expected).square().sum().backward()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other.grad)


# --- the way does not matter ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dots", [True, False], ids=["dots", "columns"])
@pytest.mark.parametrize("kernel", ["0", "1"], ids=["", "kernel"])
@pytest.mark.parametrize("kind", ["linear", "delta"])
def test_gradients_by_every_way(kind: str, kernel: str, dots: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PEFT_FPS_CPU_KERNEL", kernel)
    monkeypatch.setattr(ways, "entries_are_few", lambda structure: True)
    monkeypatch.setattr(ways, "dots_are_cheaper", lambda structure: dots)
    weight = normal(5, INPUTS) if kind == "linear" else torch.zeros(5, INPUTS)
    assert_same_function(
        lambda x, v, b: (
            sparse_linear(x, weight, v, b, built()) if kind == "linear" else sparse_delta_linear(x, v, built()) + b
        ),
        lambda x, v, b: F.linear(x, dense(weight, v, ROWS, INPUTS), b),
        normal(300, INPUTS, seed=1),
        normal(12, seed=2),
        normal(5, seed=3),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (True, True)], ids=["values", "bias", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", ["0", "1"], ids=["", "kernel"])
def test_the_gradient_of_the_bias(
    kernel: str, dtype: torch.dtype, wanted: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PEFT_FPS_CPU_KERNEL", kernel)
    monkeypatch.setattr(ways, "entries_are_few", lambda structure: True)
    x, bias, grad = normal(70, INPUTS, seed=1).to(dtype), normal(5, seed=3).to(dtype), normal(70, 5).to(dtype)
    values = normal(12, seed=2).requires_grad_(wanted[0])
    bias.requires_grad_(wanted[1])
    sparse_linear(x, normal(5, INPUTS).to(dtype), values, bias, built()).backward(grad)
    assert [values.grad is not None, bias.grad is not None] == list(wanted)
    if bias.grad is not None:
        assert bias.grad.dtype == dtype
        torch.testing.assert_close(bias.grad.double(), grad.double().sum(0), rtol=0.01, atol=0.05)


@pytest.mark.parametrize("kind", ["linear", "delta"])
@pytest.mark.parametrize("way", ["whole", "columns", "none"])
def test_what_is_given_is_kept(kind: str, way: str):
    (x, values), weight, grad = leaves(normal(7, INPUTS, seed=1), normal(12, seed=2)), normal(5, INPUTS), normal(7, 5)
    data = x.detach()
    kept = {"whole": keep_whole(data), "columns": keep_columns(data, built(), Reading()), "none": None}[way]
    with saved_tensors() as saved:
        if kind == "linear":
            result = sparse_linear(x, weight, values, None, built(), kept)
        else:
            result = sparse_delta_linear(x, values, built(), kept)
    if kept is not None:
        own = {weight.data_ptr(), values.data_ptr()}
        assert [t.data_ptr() for t in saved if t.data_ptr() not in own] == [t.data_ptr() for t in kept.tensors]
    result.backward(grad)
    expected = at_entries(grad.double().t() @ data.double(), ROWS)
    torch.testing.assert_close(values.grad.double(), expected, rtol=1e-4, atol=1e-5)
