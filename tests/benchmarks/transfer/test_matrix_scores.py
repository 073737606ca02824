"""Every formula entry by entry, in numpy."""

import math

import numpy as np
import pytest
import torch

from peft_fps.benchmarks.transfer.matrix_scores import expected_gradient, low_rank_magnitude, relative_importance
from tests.support.helpers import normal


@pytest.mark.parametrize(("neurons", "inputs"), [(6, 9), (60, 70), (110, 52)])
def test_low_rank_magnitude_is_of_the_best_approximation(neurons, inputs):
    weight = normal(neurons, inputs)
    rank = math.ceil(0.02 * min(neurons, inputs))
    # the best approximation projects onto the leading eigenvectors of WWᵀ (Eckart and Young)
    matrix = weight.double().numpy()
    leading = np.linalg.eigh(matrix @ matrix.T)[1][:, -rank:]
    expected = np.abs(leading @ leading.T @ matrix)
    np.testing.assert_allclose(low_rank_magnitude(weight).numpy(), expected, atol=1e-10)
    assert np.linalg.matrix_rank(leading @ leading.T @ matrix) == rank


def test_relative_importance_entry_by_entry():
    weight, activation = normal(3, 4), normal(4, seed=1).abs()
    weight[1], weight[:, 2] = 0, 0
    found = relative_importance(weight, activation).tolist()
    w, a = weight.double().abs().tolist(), activation.double().tolist()
    for j in range(3):
        for k in range(4):
            column, row = sum(w[i][k] for i in range(3)), sum(w[j])
            expected = (w[j][k] / column + w[j][k] / row) * a[k] ** 0.5 if w[j][k] else 0
            assert found[j][k] == pytest.approx(expected, rel=1e-9)


def test_expected_gradient_entry_by_entry():
    weight, activation, gradient = normal(3, 4), normal(4, seed=1).abs(), normal(3, seed=2).abs()
    found = expected_gradient(weight, activation, gradient)
    assert found.dtype == torch.float64
    for j, k in np.ndindex(3, 4):
        expected = abs(weight[j, k].item()) * activation[k].item() * gradient[j].item()
        assert found[j, k].item() == pytest.approx(expected, rel=1e-12)
