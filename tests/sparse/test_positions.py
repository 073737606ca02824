"""Positions of entries in stored weights, against indexing."""

import pytest
import torch

from peft_fps.sparse import build_structure, unite_structures
from peft_fps.sparse.positions import row_major, stored_positions
from tests.helpers import csr


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("matrices", [1, 3])
def test_positions_are_those_of_an_element_in_the_stored_weight(matrices: int, transposed: bool) -> None:
    each, inputs = 4, 5
    stored = torch.arange(matrices * each * inputs)
    weight = stored.view(matrices, inputs, each).transpose(1, 2) if transposed else stored.view(matrices, each, inputs)
    rows, columns = (
        grid.flatten() for grid in torch.meshgrid(*map(torch.arange, (matrices * each, inputs)), indexing="ij")
    )
    found = stored_positions(rows, columns, matrices * each, inputs, transposed, matrices)
    assert found.tolist() == weight.reshape(-1).tolist()
    back = row_major(found, matrices * each, inputs, transposed, matrices)
    assert back.tolist() == list(range(matrices * each * inputs))


def test_unions_of_stacked_selections() -> None:
    one = build_structure(*csr([[0], [1], [], [2]]), 4, 3, transposed=True, matrices=2)
    two = build_structure(*csr([[0, 2], [], [1], [2]]), 4, 3, transposed=True, matrices=2)
    union, places = unite_structures([one, two])
    expected = build_structure(*csr([[0, 2], [1], [1], [2]]), 4, 3, transposed=True, matrices=2)
    assert union.positions.tolist() == expected.positions.tolist()
    assert places.tolist() == [0, 2, 4, 0, 1, 3, 4]
