"""Scores against numpy."""

import numpy as np
import pytest
import torch
from torch import Tensor

from peft_fps.selection import importance
from tests.helpers import normal


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def magnitudes(weight: Tensor) -> np.ndarray:
    return np.abs(weight.double().numpy()).astype(np.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_magnitude(dtype: torch.dtype):
    weight = normal(3, 4).to(dtype)
    score = importance.magnitude(weight)
    assert score.dtype == torch.float32
    assert np.array_equal(score.numpy(), magnitudes(weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4,), (1, 4), (3, 4)], ids=["of-all-rows", "one-group", "per-row"])
def test_weight_times_activation(shape: tuple[int, ...], dtype: torch.dtype):
    weight, activation = normal(3, 4).to(dtype), normal(*shape, seed=1, dtype=torch.float64).abs()
    score = importance.weight_times_activation(weight, activation)
    assert score.dtype == torch.float32
    assert np.array_equal(score.numpy(), magnitudes(weight) * activation.numpy().astype(np.float32))


@pytest.mark.parametrize("shape", [(4,), (3, 4)], ids=["of-all-rows", "per-row"])
def test_activation_alone(shape: tuple[int, ...]):
    activation = normal(*shape, seed=1, dtype=torch.float64).abs()
    score = importance.activation_alone(normal(3, 4).half(), activation)
    assert score.dtype == torch.float32
    assert np.array_equal(score.numpy(), np.broadcast_to(activation.numpy().astype(np.float32), (3, 4)))


def test_random_is_seeded_and_uniform():
    def draw(seed: int, rows: int = 200) -> Tensor:
        return importance.random(torch.empty(rows, 50, dtype=torch.bfloat16), torch.Generator().manual_seed(seed))

    score = draw(3)
    assert score.dtype == torch.float32
    assert score.shape == (200, 50)
    assert 0 <= float(score.min()) < 0.01
    assert 0.99 < float(score.max()) < 1
    assert abs(float(score.mean()) - 0.5) < 0.01
    assert torch.equal(score, draw(3))
    assert not torch.equal(score, draw(4))
