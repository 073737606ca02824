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


# --- for backward passes -------------------------------------------------------------------------------------------


class Replacing(nn.Module):
    """Counts its calls in a buffer that it replaces, as `self.count = self.count + 1` does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("none", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count = self.count + 1
        return x


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("surroundings", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_modes_that_were_asked_for(surroundings: type, gradients: bool, training: bool):
    model = mixed_model()
    before = [module.training for module in model.modules()]
    x = torch.randn(3, 2)
    with surroundings():
        on, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        with undisturbed(model, gradients=gradients, training=training):
            assert {module.training for module in model.modules()} == {training}
            output = model(x.clone())
            assert output.requires_grad == gradients
            assert not output.is_inference()
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == (on, inference)
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize("fails", [False, True], ids=["", "error"])
def test_buffers_are_restored_after_training_mode(fails: bool):
    model = nn.Sequential(mixed_model(), Replacing())
    held = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    seed()
    expected = draws()
    seed()
    try:
        with undisturbed(model, gradients=True, training=True):
            model(torch.randn(5, 2))
            assert not torch.equal(model[0][1][1].running_mean, held["0.1.1.running_mean"][1])
            assert int(model[0][1][1].num_batches_tracked) == 1
            assert float(model[1].count) == 1
            draws()
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    for name, buffer in model.named_buffers():
        assert buffer is held[name][0]
        assert torch.equal(buffer, held[name][1])
    assert model[1].none is None
    assert draws() == expected


def test_a_weight_that_changes_is_seen_under_autocast():
    model, x = nn.Linear(3, 2), torch.ones(1, 3)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        before = torch.is_autocast_cache_enabled()
        with undisturbed(model, gradients=True):
            first = model(x)
            model.weight.data = model.weight.data + 1.0
            assert not torch.equal(model(x), first)
        assert torch.is_autocast_cache_enabled() == before
    with torch.autocast(torch.get_default_device().type, torch.bfloat16, cache_enabled=False):
        with undisturbed(model):
            pass
        assert not torch.is_autocast_cache_enabled()
