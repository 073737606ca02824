"""Trials of learning rates: what is taken, how long they are, and that nothing of them is left."""

import pytest
import torch
from torch import nn

from peft_fps.vision.rate_trials import RateTrial, best_rate, told, trial_steps, try_rates
from peft_fps.vision.training_loop import DivergedError
from tests.support.helpers import adapted, bits, images, tiny_vit


def trials(**accuracies: float | None) -> list[RateTrial]:
    return [RateTrial(float(rate.removeprefix("r").replace("_", ".")), found) for rate, found in accuracies.items()]


def test_the_best_rate_is_taken_and_the_smallest_of_equals():
    assert best_rate(trials(r0_1=0.5, r0_3=0.7, r1=0.7, r3=None)) == 0.3
    assert best_rate(trials(r3=0.7, r1=0.7)) == 1.0
    with pytest.raises(ValueError, match=r"training diverged at each of 1, 3, expected one"):
        best_rate(trials(r1=None, r3=None))


def test_it_says_why():
    assert told(trials(r0_1=0.5, r1=None)).splitlines() == [
        "learning rate 0.1: validation accuracy 50.00%",
        "learning rate 1: diverged",
        "taken: 0.1, the best, and the smallest of equals",
    ]


@pytest.mark.parametrize(
    ("images_", "size", "epochs", "steps"),
    [(800, 8, 30, 100), (801, 8, 30, 101), (40, 8, 30, 50), (40, 8, 3, 15), (10**6, 32, 2, 200)],
)
def test_steps_are_those_of_an_epoch_within_bounds(images_, size, epochs, steps):
    assert trial_steps(images_, size, epochs) == steps


def test_every_trial_begins_from_the_same_state_which_comes_back():
    model = adapted(tiny_vit()).train()
    model.base_model.model.vit.register_buffer("count", torch.zeros(1))
    state = {name: bits(tensor) for name, tensor in model.state_dict().items()}
    random, seen = torch.random.get_rng_state(), []

    def train(rate: float) -> None:
        assert {name: bits(tensor) for name, tensor in model.state_dict().items()} == state
        torch.rand(1)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
        model(pixel_values=images(2), labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
        model.base_model.model.vit.count += 1
        seen.append(rate)
        if rate == 3.0:
            raise DivergedError("at 3")

    def judge() -> float:
        model.eval()
        return 0.1 * len(seen)

    assert try_rates(model, train, judge, [1.0, 2.0, 3.0]) == trials(r1=0.1, r2=0.2, r3=None)
    assert {name: bits(tensor) for name, tensor in model.state_dict().items()} == state
    assert torch.equal(torch.random.get_rng_state(), random)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_state_comes_back_after_an_error():
    model = nn.Linear(2, 2)
    before = bits(model.weight)

    def judge() -> float:
        raise KeyError

    with pytest.raises(KeyError):
        try_rates(model, lambda rate: model.weight.data.fill_(rate), judge, [1.0])
    assert bits(model.weight) == before
