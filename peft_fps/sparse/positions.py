"""Positions of entries in a weight as it is stored, from their neurons and inputs, and back.

| stored as | `transposed` | `matrices` |
|---|---|---|
| `(neurons, inputs)` | no | 1 |
| `(inputs, neurons)` | yes | 1 |
| `(matrices, neurons / matrices, inputs)` | no | M |
| `(matrices, inputs, neurons / matrices)` | yes | M |
"""

import torch
from torch import Tensor


def stored_positions(
    rows: Tensor, columns: Tensor, neurons: int, inputs: int, transposed: bool, matrices: int = 1
) -> Tensor:
    """Return the positions of entries in the flattened stored weight, `(nnz,)` int64.

    Args:
        rows: neuron of each entry, `(nnz,)` int64. The neurons of several matrices count on.
        columns: input of each entry, `(nnz,)` int64.
        neurons: number of neurons of all matrices together.
        inputs: fan-in of a neuron.
        transposed: whether each matrix is stored as `(inputs, neurons)`.
        matrices: number of matrices that the weight stacks.
    """
    if not transposed:
        return rows * inputs + columns
    each = neurons // matrices
    return torch.div(rows, each, rounding_mode="floor") * (each * inputs) + columns * each + rows % each


def row_major(stored: Tensor, neurons: int, inputs: int, transposed: bool, matrices: int = 1) -> Tensor:
    """Return the positions of entries in the weight flattened as `(neurons, inputs)`, `(nnz,)` int64.

    Args:
        stored: positions that `stored_positions` returns for the same sizes.
        neurons: as there, and so are the following.
        inputs: fan-in of a neuron.
        transposed: whether each matrix is stored as `(inputs, neurons)`.
        matrices: number of matrices that the weight stacks.
    """
    if not transposed:
        return stored
    each = neurons // matrices
    matrix = torch.div(stored, each * inputs, rounding_mode="floor")
    within = stored - matrix * (each * inputs)
    return (matrix * each + within % each) * inputs + torch.div(within, each, rounding_mode="floor")
