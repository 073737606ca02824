"""Scores against numpy."""

import numpy as np
import pytest
import torch
from torch import Tensor

from peft_fps.importance.activation import activation_alone, weight_times_activation
from peft_fps.importance.magnitude import magnitude
from tests.support.helpers import normal


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def magnitudes(weight: Tensor) -> np.ndarray:
    return np.abs(weight.double().numpy()).astype(np.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_magnitude(dtype: torch.dtype):
    weight = normal(3, 4).to(dtype)
    score = magnitude(weight)
    assert score.dtype == torch.float32
    assert np.array_equal(score.numpy(), magnitudes(weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4,), (1, 4), (3, 4)], ids=["of-all-rows", "one-group", "per-row"])
def test_weight_times_activation(shape: tuple[int, ...], dtype: torch.dtype):
    weight, activation = normal(3, 4).to(dtype), normal(*shape, seed=1, dtype=torch.float64).abs()
    score = weight_times_activation(weight, activation)
    assert score.dtype == torch.float32
    assert np.array_equal(score.numpy(), magnitudes(weight) * activation.numpy().astype(np.float32))


@pytest.mark.parametrize("shape", [(4,), (3, 4)], ids=["of-all-rows", "per-row"])
def test_activation_alone(shape: tuple[int, ...]):
    activation = normal(*shape, seed=1, dtype=torch.float64).abs()
    score = activation_alone(normal(3, 4).half(), activation)
    assert score.dtype == torch.float32
    assert np.array_equal(score.numpy(), np.broadcast_to(activation.numpy().astype(np.float32), (3, 4)))
