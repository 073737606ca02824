"""Convolutions with W + ΔW and their gradients, against autograd through a dense W + ΔW."""

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peft_fps.sparse import Geometry, Layout, build_structure, sparse_convolution
from tests.sparse.cases import assert_same_function, saved_tensors
from tests.support.helpers import csr, normal


CONVOLUTIONS: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED: dict[int, Any] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class Case(NamedTuple):
    """A convolution: its input, weight, selected columns by neuron, and geometry."""

    x: Tensor
    weight: Tensor
    rows: list[list[int]]
    geometry: Geometry

    @property
    def layout(self) -> Layout:
        groups, taps = self.geometry.groups, self.weight.shape[2:].numel()
        return Layout(True, groups, taps) if self.geometry.transposed else Layout()

    def ours(self, x: Tensor, values: Tensor, bias: Tensor | None = None) -> Tensor:
        fan_in = self.weight.numel() // len(self.rows)
        where = build_structure(*csr(self.rows), len(self.rows), fan_in, self.layout)
        return sparse_convolution(x, self.weight, values, bias, where, self.geometry)

    def naive(self, x: Tensor, values: Tensor, bias: Tensor | None = None) -> Tensor:
        stride, padding, dilation, groups, transposed, output_padding = self.geometry
        dimensions, taps = len(stride), self.weight.shape[2:].numel()
        width, channels = self.weight.shape[1], self.weight.shape[0] // groups
        places = []
        for row, columns in enumerate(self.rows):
            for column in columns:
                if transposed:
                    channel = row // width * channels + column // taps
                    places.append((channel * width + row % width) * taps + column % taps)
                else:
                    places.append(row * self.weight[0].numel() + column)
        flat = self.weight.reshape(-1).index_put((torch.tensor(places, dtype=torch.int64),), values, accumulate=True)
        weight = flat.view(self.weight.shape)
        if transposed:
            return TRANSPOSED[dimensions](x, weight, bias, stride, padding, output_padding, groups, dilation)
        return CONVOLUTIONS[dimensions](x, weight, bias, stride, padding, dilation, groups)

    def values(self) -> Tensor:
        return normal(sum(map(len, self.rows)), seed=2).to(self.x.dtype)

    def biases(self) -> Tensor:
        return normal(len(self.rows), seed=3).to(self.x.dtype)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    dimensions, transposed = draw(st.integers(1, 3)), draw(st.booleans())

    def numbers(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dimensions))

    groups, inputs, outputs = draw(st.sampled_from([(1, 2, 3), (2, 4, 4), (3, 3, 6)]))
    kernel, stride, padding, dilation = numbers(1, 3), numbers(1, 3), numbers(0, 1), numbers(1, 2)
    more = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    geometry = Geometry(stride, padding, dilation, groups, transposed, more if transposed else (0,) * dimensions)
    shape = (inputs, outputs // groups) if transposed else (outputs, inputs // groups)
    weight, fan_in = normal(*shape, *kernel).double(), inputs // groups * torch.Size(kernel).numel()
    row = st.one_of(st.sets(st.integers(0, fan_in - 1), max_size=4).map(sorted), st.just(list(range(fan_in))))
    rows = draw(st.lists(row, min_size=outputs, max_size=outputs))
    batch = draw(st.sampled_from([(), (0,), (1,), (2,)]))
    return Case(normal(*batch, inputs, *numbers(5, 6), seed=1).double(), weight, rows, geometry)


@settings(max_examples=60)
@given(cases(), st.booleans())
def test_every_convolution(case: Case, bias: bool):
    assert_same_function(case.ours, case.naive, case.x, case.values(), *([case.biases()] if bias else []))


@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
def test_channels_last_memory(transposed: bool):
    rows = [[0, 11], [], [3], list(range(12))]
    geometry = Geometry((1, 1), (0, 0), (1, 1), 1, transposed, (0, 0))
    weight = normal(3, 4, 2, 2) if transposed else normal(4, 3, 2, 2)
    x = normal(2, 3, 6, 6, seed=1).to(memory_format=torch.channels_last)
    for stored in (weight, weight.to(memory_format=torch.channels_last)):
        case = Case(x, stored, rows, geometry)
        assert_same_function(case.ours, case.naive, x, case.values(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
def test_backward_keeps_no_second_weight(transposed: bool):
    rows, geometry = [[0, 71]] * 16, Geometry((1, 1), (0, 0), (1, 1), 1, transposed, (0, 0))
    weight = normal(8, 16, 3, 3) if transposed else normal(16, 8, 3, 3)
    x, values = normal(2, 8, 5, 5, seed=1).requires_grad_(), normal(32, seed=2).requires_grad_()
    with saved_tensors() as kept:
        Case(x, weight, rows, geometry).ours(x, values)
    aliases = {x.data_ptr(), weight.data_ptr(), values.data_ptr()}
    assert len(kept) == 3
    assert {tensor.data_ptr() for tensor in kept} == aliases
