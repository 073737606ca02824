"""Where the entries of a weight matrix lie in its storage, against a walk over the stored weight."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from peft_fps.sparse import Layout, build_structure, unite_structures
from tests.support.helpers import csr


def walked(groups: int, channels: int, width: int, taps: int) -> Tensor:
    """The place in storage of every entry of a transposed convolution's matrix; both numbers count within a group."""
    matrix = torch.full((groups * width, channels * taps), -1)
    place = 0
    for group in range(groups):
        for channel in range(channels):
            for output in range(width):
                for tap in range(taps):
                    matrix[group * width + output, channel * taps + tap] = place
                    place += 1
    return matrix


sizes = st.integers(1, 3)


@given(sizes, sizes, sizes, sizes)
def test_a_transposed_convolution(groups: int, channels: int, width: int, taps: int):
    expected, layout = walked(groups, channels, width, taps), Layout(True, groups, taps)
    neurons, inputs = expected.shape
    rows, columns = torch.arange(neurons).repeat_interleave(inputs), torch.arange(inputs).repeat(neurons)
    positions = layout.positions(rows, columns, neurons, inputs)
    assert positions.tolist() == expected.reshape(-1).tolist()
    assert layout.entries(positions, neurons, inputs).tolist() == list(range(neurons * inputs))
    stored = torch.arange(neurons * inputs).view(groups * channels, width, taps)
    assert layout.matrix(stored).tolist() == expected.tolist()


def test_weights_by_rows_and_by_columns_are_not_copied():
    weight = torch.arange(24.0).view(4, 2, 3)
    assert Layout().matrix(weight).tolist() == weight.view(4, 6).tolist()
    stored = weight.view(4, 6)
    for seen in (Layout(transposed=True).matrix(stored), Layout(transposed=True).matrix(stored.t())):
        assert seen.data_ptr() == stored.data_ptr()
    assert Layout(transposed=True).matrix(stored).tolist() == stored.t().tolist()


@pytest.mark.parametrize("groups", [1, 2])
def test_the_structure_and_the_union_of_selections(groups: int):
    places = walked(groups, 2, 2, 3)
    first = [[0, 4], [5], [1], [0, 1, 2]][: 2 * groups]
    second = [[4], [], [2, 5], [3]][: 2 * groups]
    layout = Layout(True, groups, 3)
    left, right = (build_structure(*csr(rows), 2 * groups, 6, layout) for rows in (first, second))
    assert left.positions.tolist() == [int(places[row, column]) for row, held in enumerate(first) for column in held]
    union = [sorted({*one, *other}) for one, other in zip(first, second, strict=True)]
    united, index = unite_structures([left, right])
    assert united.layout == layout
    assert united.positions.tolist() == [int(places[row, column]) for row, held in enumerate(union) for column in held]
    assert united.positions[index].tolist() == left.positions.tolist() + right.positions.tolist()
