"""Lookups and output embeddings with W + ΔW against dense ones."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from peft_fps.sparse import Structure, add_token_products, changed_lookup
from tests.sparse.cases import built
from tests.support.helpers import bits, flat_positions, normal, selections


def dense(rows: list[list[int]], inputs: int, values: Tensor) -> Tensor:
    """ΔW as it is stored, `(inputs, neurons)`."""
    places = torch.tensor(flat_positions(rows, inputs, transposed=True)).long()
    return values.new_zeros(inputs * len(rows)).index_put((places,), values).view(inputs, -1)


def case(rows: list[list[int]], inputs: int) -> tuple[Structure, Tensor, Tensor]:
    values = normal(sum(map(len, rows)), seed=1).requires_grad_()
    return built(rows, inputs, transposed=True), normal(inputs, len(rows)), values


@given(selections(), st.integers(0, 3), st.data())
def test_a_lookup_and_its_gradients_equal_those_of_a_dense_weight(
    selection: tuple[int, list[list[int]]], positions: int, data: st.DataObject
) -> None:
    inputs, rows = selection
    structure, weight, values = case(rows, inputs)
    flat = data.draw(st.lists(st.integers(0, inputs - 1), min_size=2 * positions, max_size=2 * positions))
    padding = data.draw(st.sampled_from([None, 0, inputs - 1]))
    tokens = torch.tensor(flat, dtype=torch.int64).view(2, positions)
    looked_up = F.embedding(tokens, weight).requires_grad_()
    result = changed_lookup(looked_up, tokens, values, structure, padding)
    expected = F.embedding(tokens, weight + dense(rows, inputs, values), padding_idx=padding)
    assert torch.equal(result, expected)
    if not values.numel() or not positions:
        return
    grad = normal(*expected.shape, seed=2)
    grad_rows, grad_values = torch.autograd.grad(result, (looked_up, values), grad)
    assert torch.equal(grad_rows, grad)
    torch.testing.assert_close(grad_values, *torch.autograd.grad(expected, values, grad))


ROWS, INPUTS = [[0, 3], [], [1, 2, 4], [0, 1, 2, 3, 4]], 6
TOKENS = torch.tensor([[0, 5, 3], [3, 3, 1]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
def test_rows_are_those_of_the_sum_rounded_once(dtype: torch.dtype, integers: torch.dtype) -> None:
    structure, weight, values = case(ROWS, INPUTS)
    weight = weight.to(dtype)
    exact = torch.promote_types(dtype, torch.float32)
    expected = (weight.to(exact) + dense(ROWS, INPUTS, values.detach()).to(exact)).to(dtype)[TOKENS]
    result = changed_lookup(weight[TOKENS], TOKENS.to(integers), values, structure)
    assert bits(result) == bits(expected)
    result.sum().backward()
    assert values.grad.dtype == torch.float32


@pytest.mark.parametrize("padding", [None, 3])
def test_what_transforms_see_is_the_same_function(padding: int | None) -> None:
    structure, weight, values = case(ROWS, INPUTS)

    def loss(changes: Tensor) -> Tensor:
        return changed_lookup(weight[TOKENS], TOKENS, changes, structure, padding).square().sum()

    by_autograd = torch.autograd.grad(loss(values), values)[0]
    torch.testing.assert_close(torch.func.grad(loss)(values.detach()), by_autograd)
    compiled: Any = torch.compile(loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(values), loss(values))
    torch.testing.assert_close(torch.autograd.grad(compiled(values), values)[0], by_autograd)


def test_a_second_derivative_of_the_values_is_refused_with_what_to_do() -> None:
    structure, weight, values = case(ROWS, INPUTS)
    result = changed_lookup(weight[TOKENS].requires_grad_(), TOKENS, values, structure)
    (gradient,) = torch.autograd.grad(result.square().sum(), values, create_graph=True)
    with pytest.raises(ValueError, match=r"torch\.func"):
        gradient.sum().backward()


def test_no_tensor_of_the_weights_size_is_formed() -> None:
    inputs, neurons = 5000, 64
    rows = [[7, 11 + neuron] for neuron in range(neurons)]
    structure, weight, values = case(rows, inputs)
    tokens, sizes = torch.tensor([7, 11, 20, 4999]), []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            sizes.append(result.numel() if isinstance(result, Tensor) else 0)
            return result

    structure.by_column  # noqa: B018  # derived once
    with Sizes():
        changed_lookup(weight[tokens], tokens, values, structure).sum().backward()
    assert 0 < max(sizes) <= len(tokens) * neurons


@given(selections())
def test_output_embeddings_and_their_gradients_equal_those_of_a_dense_weight(
    selection: tuple[int, list[list[int]]],
) -> None:
    inputs, rows = selection
    structure, weight, values = case(rows, inputs)
    x, bias = normal(2, 3, len(rows), seed=3).requires_grad_(), normal(inputs, seed=4)
    result = add_token_products(F.linear(x, weight, bias), x, values, structure, weight)
    expected = F.linear(x, weight + dense(rows, inputs, values), bias)
    torch.testing.assert_close(result, expected)
    if values.numel():
        grad = normal(*expected.shape, seed=2)
        found = torch.autograd.grad(result, (x, values), grad)
        torch.testing.assert_close(found, torch.autograd.grad(expected, (x, values), grad))


def test_in_half_precision_output_embeddings_change_by_what_a_merge_writes() -> None:
    structure, weight, values = case(ROWS, INPUTS)
    weight = weight.bfloat16()
    values = (values.detach() * 1e-5).requires_grad_()  # below half a unit in the last place
    x = normal(3, len(ROWS)).bfloat16()
    assert torch.equal(add_token_products(F.linear(x, weight), x, values, structure, weight), F.linear(x, weight))
