"""Structures of selections as plain lists, numbers at their entries, and products compared through autograd."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from peft_fps.sparse import (
    Geometry,
    Layout,
    Structure,
    build_structure,
    sparse_convolution,
    sparse_delta_linear,
    sparse_linear,
    structure,
)
from tests.support.helpers import csr, flat_positions, normal


Rows = list[list[int]]
Selection = tuple[int, Rows]
"""Fan-in, and selected columns of every neuron."""

STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda matrix: matrix,
    "transposed": lambda matrix: matrix.t().contiguous().t(),
    "strided columns": lambda matrix: matrix.repeat_interleave(2, 1)[:, ::2],
    "strided tokens": lambda matrix: matrix.repeat_interleave(3, 0)[::3],
    "part of a row": lambda matrix: torch.cat([matrix, matrix, matrix], 1)[:, matrix.shape[1] : 2 * matrix.shape[1]],
    "one token, expanded": lambda matrix: matrix[:1].expand_as(matrix),
    "one column, expanded": lambda matrix: matrix[:, :1].expand_as(matrix),
    "one number, expanded": lambda matrix: matrix[:1, :1].expand_as(matrix) if matrix.numel() else matrix,
}
"""Views of a matrix `(tokens, neurons)` or `(tokens, inputs)`; the last three repeat some of its numbers."""


def built(
    rows: Rows, inputs: int, transposed: bool = False, product_elements: int = structure.PRODUCT_ELEMENTS
) -> Structure:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(structure, "PRODUCT_ELEMENTS", product_elements)
        return build_structure(*csr(rows), len(rows), inputs, Layout(transposed))


def union(*several: Rows) -> list[int]:
    """Columns that any neuron reads."""
    return sorted({column for rows in several for row in rows for column in row})


def at_entries(matrix: Tensor, rows: Rows) -> Tensor:
    """The numbers of a matrix `(neurons, inputs)` at the entries, one after the other."""
    return torch.cat([matrix[row, columns] for row, columns in enumerate(rows)])


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def assert_same_function(
    ours: Callable[..., Tensor], naive: Callable[..., Tensor], *tensors: Tensor, **tolerance: Any
) -> None:
    """The same result, and the same gradients for all arguments."""
    left, right = leaves(*tensors), leaves(*tensors)
    result, expected = ours(*left), naive(*right)
    assert result.dtype == expected.dtype
    torch.testing.assert_close(result, expected, **tolerance)
    grad = normal(*expected.shape, seed=9).to(expected.dtype)
    result.backward(grad)
    expected.backward(grad)
    for ours_leaf, naive_leaf in zip(left, right, strict=True):
        assert ours_leaf.grad is not None
        torch.testing.assert_close(ours_leaf.grad, naive_leaf.grad, **tolerance)


@contextmanager
def saved_tensors() -> Iterator[list[Tensor]]:
    """Tensors that autograd keeps for backward within the block."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


# --- every product with W + ΔW --------------------------------------------------------------------------------------

Product = Callable[[Tensor, Tensor, Tensor], Tensor]

ROWS, INPUTS = [[0, 3], [], [0, 3, 5], [0, 1, 2, 3, 4, 5], [5]], 6
PATCHES = [[0, 7], [], [3], list(range(8))]
GEOMETRY = ((2, 1), (1, 0), (1, 2), 2)
SPREAD = ((2, 1), (1, 0), (1, 0), 2, (1, 2))  # stride, padding, output padding, groups, dilation


def dense(weight: Tensor, values: Tensor, rows: Rows, inputs: int, transposed: bool = False) -> Tensor:
    """W + ΔW in the logical shape, differentiable by autograd."""
    places = torch.tensor(flat_positions(rows, inputs, transposed), dtype=torch.int64)
    change = torch.zeros(weight.numel(), dtype=values.dtype).index_add(0, places, values)
    summed = (weight.reshape(-1) + change).view(weight.shape)
    return summed.t() if transposed else summed


def products(*leading: int) -> dict[str, tuple[Product, Product, list[Tensor], Tensor]]:
    """Ours and a dense product of (x, values, bias), arguments, and the weight; a linear x is `(*leading, inputs)`."""
    weight, kernel = normal(5, INPUTS, dtype=torch.float64), normal(4, 2, 2, 2, dtype=torch.float64)
    plain, turned = (built(ROWS, INPUTS, transposed) for transposed in (False, True))
    patches, stored = built(PATCHES, 8), weight.t().contiguous()
    x, values, bias = (normal(*shape, seed=2, dtype=torch.float64) for shape in ((*leading, INPUTS), (12,), (5,)))
    image = normal(2, 4, 4, 3, dtype=torch.float64)
    stride, padding, output_padding, groups, dilation = SPREAD
    geometry = Geometry(stride, padding, dilation, groups, True, output_padding)
    spread = build_structure(*csr(PATCHES), 4, 8, Layout(True, groups=2, taps=4))

    def scattered(values: Tensor) -> Tensor:
        """ΔW of the transposed convolution: of neuron and column to channel, place in the group, and tap."""
        places = [
            ((row // 2 * 2 + column // 4) * 2 + row % 2) * 4 + column % 4
            for row, columns in enumerate(PATCHES)
            for column in columns
        ]
        return torch.zeros(32).double().index_add(0, torch.tensor(places), values).view(kernel.shape)

    return {
        "linear": (
            lambda x, v, b: sparse_linear(x, weight, v, b, plain),
            lambda x, v, b: F.linear(x, dense(weight, v, ROWS, INPUTS), b),
            [x, values, bias],
            weight,
        ),
        "transposed": (
            lambda x, v, b: sparse_linear(x, stored, v, b, turned),
            lambda x, v, b: F.linear(x, dense(stored, v, ROWS, INPUTS, True), b),
            [x, values, bias],
            stored,
        ),
        "delta": (
            lambda x, v, b: sparse_delta_linear(x, v, plain) + b,
            lambda x, v, b: F.linear(x, dense(torch.zeros_like(weight), v, ROWS, INPUTS), b),
            [x, values, bias],
            weight,
        ),
        "conv": (
            lambda x, v, b: sparse_convolution(x, kernel, v, b, patches, Geometry(*GEOMETRY)),
            lambda x, v, b: F.conv2d(x, dense(kernel, v, PATCHES, 8), b, *GEOMETRY),
            [image, values[:11], bias[:4]],
            kernel,
        ),
        "transposed conv": (
            lambda x, v, b: sparse_convolution(x, kernel, v, b, spread, geometry),
            lambda x, v, b: F.conv_transpose2d(x, kernel + scattered(v), b, *SPREAD),
            [image, values[:11], bias[:4]],
            kernel,
        ),
    }


KINDS = list(products(3))
