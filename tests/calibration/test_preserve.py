"""A forward pass that leaves no trace."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from peft_fps.calibration import undisturbed


def mixed_model() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2)), nn.ReLU())
    model.train()
    model[1].eval()
    model[1][0].train()
    return model


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def seed() -> None:
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)


@pytest.mark.parametrize("fails", [False, True], ids=["", "error"])
def test_modes_and_random_states_are_restored(fails: bool):
    model = mixed_model()
    before = [module.training for module in model.modules()]
    statistics = model[1][1].running_mean.clone()
    seed()
    expected = draws()
    seed()
    try:
        with undisturbed(model):
            assert not any(module.training for module in model.modules())
            assert not torch.is_grad_enabled()
            assert not model(torch.ones(3, 2)).requires_grad
            draws()
            seed()
            model[0].train()
            if fails:
                raise KeyError("in the block")
    except KeyError:
        assert fails
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled()
    assert torch.equal(model[1][1].running_mean, statistics)
    assert draws() == expected


def test_gradients_stay_off_where_they_were_off():
    model = mixed_model()
    with torch.no_grad(), undisturbed(model):
        pass
    with torch.no_grad():
        with undisturbed(model):
            pass
        assert not torch.is_grad_enabled()


def test_a_model_without_parameters():
    model = nn.ReLU().train()
    with undisturbed(model):
        assert not model.training
    assert model.training
