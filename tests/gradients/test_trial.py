"""Parameters on trial against AdamW written down a second time, and what is left of the trial afterwards."""

import math
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from peft_fps.gradients import Exact, Weight
from peft_fps.gradients.trial import Trial, distinct, hand_in, on_trial
from peft_fps.sparse import Layout
from tests.support.helpers import bits, normal, tiny_mlp


def naive_adam(start: Tensor, gradients: list[Tensor], rate: float) -> Tensor:
    """AdamW without weight decay (Kingma and Ba 2015, algorithm 1) in float64."""
    weight = start.double()
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for t, gradient in enumerate(gradients, 1):
        g = gradient.double()
        first = 0.9 * first + 0.1 * g
        second = 0.999 * second + 0.001 * g**2
        weight = weight - rate * (first / (1 - 0.9**t)) / (torch.sqrt(second / (1 - 0.999**t)) + 1e-8)
    return weight


@pytest.mark.parametrize("shape", [(), (3,), (4, 5), (2, 3, 2, 2)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 1e-5), (torch.float16, 1e-5)],
    ids=str,
)
def test_steps_are_those_of_adamw(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float):
    parameter = nn.Parameter(normal(*shape, dtype=dtype))
    start, gradients = parameter.detach().clone(), [normal(*shape, seed=seed, dtype=dtype) for seed in range(1, 6)]
    trial = Trial(parameter, 0.01)
    for gradient in gradients:
        trial.step(gradient)
    expected = naive_adam(start, gradients, 0.01)
    torch.testing.assert_close(trial.trained.detach().double(), expected, rtol=tolerance, atol=tolerance)
    assert parameter.dtype == dtype
    assert bits(parameter) == bits(trial.trained.to(dtype))  # what the model computes with
    change = trial.change()
    assert change.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(change.double(), (expected - start.double()).abs(), rtol=tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_steps_below_the_precision_of_half_weights_add_up(dtype: torch.dtype):
    rate, steps = 1e-4, 60
    parameter = nn.Parameter(torch.ones(3, dtype=dtype))
    assert torch.equal(parameter - rate, parameter)  # one step is too small to see
    trial = Trial(parameter, rate)
    trial.step(torch.ones(3, dtype=dtype))
    assert torch.equal(parameter, torch.ones_like(parameter))
    for _ in range(steps - 1):
        trial.step(torch.ones(3, dtype=dtype))
    assert trial.change().tolist() == pytest.approx([steps * rate] * 3, rel=1e-3)
    assert (parameter < 1).all()


def test_gradients_left_in_place_are_not_taken_for_more():
    trial = Trial(nn.Parameter(torch.zeros(2)), 0.1)
    gradient = torch.ones(2)
    trial.step(gradient)
    assert trial.trained.grad is None
    assert gradient.tolist() == [1, 1]


# --- restoration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "error", [None, ValueError("stop"), KeyboardInterrupt("stop")], ids=lambda e: type(e).__name__
)
def test_parameters_get_their_own_memory_back(error: BaseException | None, dtype: torch.dtype):
    model = tiny_mlp().to(dtype)
    parameters = dict(model.named_parameters())
    before = {name: (p.data_ptr(), bits(p)) for name, p in parameters.items()}
    expected = nullcontext() if error is None else pytest.raises(type(error), match="stop")
    with expected, on_trial(parameters, 0.1) as trials:
        assert set(trials) == set(parameters)
        for name, trial in trials.items():
            trial.step(torch.ones_like(parameters[name]))
            assert parameters[name].data_ptr() != before[name][0]
            assert bits(parameters[name]) != before[name][1]
        if error is not None:
            raise error
    assert {name: (p.data_ptr(), bits(p)) for name, p in parameters.items()} == before
    assert all(p.requires_grad and p.grad is None for p in parameters.values())


def test_a_trial_that_cannot_begin_leaves_nothing(monkeypatch: pytest.MonkeyPatch):
    parameters = dict(tiny_mlp().named_parameters())
    before = {name: (p.data_ptr(), bits(p)) for name, p in parameters.items()}
    begin, begun = torch.optim.AdamW.__init__, []

    def out_of_memory(*args: object, **kwargs: object) -> None:
        begun.append(1)
        if len(begun) == 3:
            raise torch.OutOfMemoryError("no room")
        begin(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.optim.AdamW, "__init__", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError), on_trial(parameters, 0.1):
        pass
    assert len(begun) == 3
    assert {name: (p.data_ptr(), bits(p)) for name, p in parameters.items()} == before


def test_a_parameter_with_two_names_counts_under_the_first():
    one, other = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    assert distinct({"a": one, "b": other, "c": one, "d": other}) == {"a": one, "b": other}
    assert distinct({}) == {}


# --- handing in -----------------------------------------------------------------------------------------------------


def test_changes_are_handed_in_as_neurons_by_inputs():
    weights = {
        "linear": Weight(nn.Parameter(normal(3, 4))),
        "transposed": Weight(nn.Parameter(normal(4, 3)), Layout(transposed=True)),
        "conv": Weight(nn.Parameter(normal(2, 3, 2, 2))),
    }
    changes = {path: normal(*weight.parameter.shape, seed=1).abs() for path, weight in weights.items()}
    held = {path: Exact() for path in weights}
    hand_in(changes.items(), weights, held)
    assert torch.equal(held["linear"].rows(0, 3), changes["linear"])
    assert torch.equal(held["transposed"].rows(0, 3), changes["transposed"].t())
    assert torch.equal(held["conv"].rows(0, 2), changes["conv"].reshape(2, 12))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_changes_that_are_not_finite_are_refused(value: float):
    weights = {path: Weight(nn.Parameter(normal(2, 2))) for path in ("good", "bad")}
    changes = [("good", torch.ones(2, 2)), ("bad", torch.tensor([[1.0, value], [1, 1]]))]
    with pytest.raises(ValueError, match=r"bad: .* hold NaN or infinity .* Lower selection_learning_rate"):
        hand_in(changes, weights, {path: Exact() for path in weights})
