"""Positions of entries in stacked weights, against indexing."""

import pytest
import torch

from peft_fps.sparse import Layout, build_structure, unite_structures
from tests.support.helpers import csr


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("matrices", [1, 3])
def test_positions_are_those_of_an_element_in_the_stored_weight(matrices: int, transposed: bool) -> None:
    each, inputs = 4, 5
    stored = torch.arange(matrices * each * inputs)
    held = stored.view(matrices, inputs, each) if transposed else stored.view(matrices, each, inputs)
    weight = held.transpose(1, 2) if transposed else held
    rows, columns = (
        grid.flatten() for grid in torch.meshgrid(*map(torch.arange, (matrices * each, inputs)), indexing="ij")
    )
    layout = Layout(transposed, groups=matrices, stacked=True)
    found = layout.positions(rows, columns, matrices * each, inputs)
    assert found.tolist() == weight.reshape(-1).tolist()
    assert layout.entries(found, matrices * each, inputs).tolist() == list(range(matrices * each * inputs))
    assert layout.matrix(held).tolist() == weight.reshape(-1, inputs).tolist()


def test_unions_of_stacked_selections() -> None:
    stacked = Layout(True, groups=2, stacked=True)
    one = build_structure(*csr([[0], [1], [], [2]]), 4, 3, stacked)
    two = build_structure(*csr([[0, 2], [], [1], [2]]), 4, 3, stacked)
    union, places = unite_structures([one, two])
    expected = build_structure(*csr([[0, 2], [1], [1], [2]]), 4, 3, stacked)
    assert union.positions.tolist() == expected.positions.tolist()
    assert places.tolist() == [0, 2, 4, 0, 1, 3, 4]
