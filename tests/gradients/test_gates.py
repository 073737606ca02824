"""Hard-concrete gates against the formulas of Louizos et al. 2018, draws, and numerical derivatives."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from peft_fps.gradients.gates import FIRST_LOGIT, open_probability, sample_gate, typical_gate


GAMMA, ZETA, BETA = -1.5, 1.5, 1.0
"""Stretched interval and temperature of DiffPruning, in the paper's letters."""

logits = st.floats(-12, 12)
noises = st.floats(0.001, 0.999)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def naive_gate(alpha: float, u: float) -> float:
    """Equations 10 and 11."""
    s = sigmoid((math.log(u) - math.log(1 - u) + alpha) / BETA)
    return min(1.0, max(0.0, s * (ZETA - GAMMA) + GAMMA))


def probability_below(alpha: float, bound: float) -> float:
    """Distribution function of the stretched variable, eq. 21 of the appendix at the bound's place in (0, 1)."""
    place = (bound - GAMMA) / (ZETA - GAMMA)
    return sigmoid(BETA * math.log(place / (1 - place)) - alpha)


def double(value: float | list[float]) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


@given(logits, noises)
def test_a_sampled_gate_is_that_of_the_paper(alpha: float, u: float):
    found = sample_gate(double(alpha), double(u))
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(naive_gate(alpha, u), abs=1e-12)


@given(logits)
def test_a_typical_gate_is_the_papers_estimator_for_testing(alpha: float):
    expected = min(1.0, max(0.0, sigmoid(alpha) * (ZETA - GAMMA) + GAMMA))  # equation 13
    assert typical_gate(double(alpha)).item() == pytest.approx(expected, abs=1e-12)


@given(logits)
def test_the_open_probability_is_the_papers_penalty(alpha: float):
    expected = sigmoid(alpha - BETA * math.log(-GAMMA / ZETA))  # equation 12
    assert open_probability(double(alpha)).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("alpha", [-3.0, -0.7, 0.0, 1.2, 2.5, 5.0])
def test_draws_are_shut_and_wide_open_as_often_as_the_distribution_says(alpha: float):
    draws = 400_000
    noise = torch.rand(draws, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gates = sample_gate(torch.full_like(noise, alpha), noise)
    shut, wide = probability_below(alpha, 0.0), 1 - probability_below(alpha, 1.0)
    within = 5 * 0.5 / math.sqrt(draws)  # five standard deviations at most
    assert (gates == 0).double().mean().item() == pytest.approx(shut, abs=within)
    assert (gates == 1).double().mean().item() == pytest.approx(wide, abs=within)
    assert (gates > 0).double().mean().item() == pytest.approx(open_probability(double(alpha)).item(), abs=within)


def test_gates_start_open_with_the_probability_of_the_source():
    assert FIRST_LOGIT == 5
    assert open_probability(double(FIRST_LOGIT)).item() == pytest.approx(0.9933, abs=5e-5)
    assert typical_gate(double(FIRST_LOGIT)).item() == 1


@given(st.lists(st.tuples(logits, noises), min_size=1, max_size=5))
def test_gradients_where_gates_are_smooth(drawn: list[tuple[float, float]]):
    smooth = [(alpha, u) for alpha, u in drawn if 0.001 < naive_gate(alpha, u) < 0.999]
    alphas = double([alpha for alpha, _ in smooth]).requires_grad_()
    noise = double([u for _, u in smooth])
    if smooth:
        assert torch.autograd.gradcheck(lambda logit: sample_gate(logit, noise), alphas)


def test_gradients_of_typical_gates_and_of_open_probabilities():
    assert torch.autograd.gradcheck(typical_gate, double([0.1, 0.4, 1.5]).requires_grad_())
    assert torch.autograd.gradcheck(open_probability, double([-7.0, -0.01, 0.4, 6.0]).requires_grad_())


@pytest.mark.parametrize(("alpha", "u"), [(5.0, 0.5), (-5.0, 0.5), (0.0, 0.99), (0.0, 0.2)])
def test_gates_that_are_shut_or_wide_open_pass_no_gradient(alpha: float, u: float):
    logit = double(alpha).requires_grad_()
    gate = sample_gate(logit, double(u))
    assert gate.item() in (0.0, 1.0)
    gate.backward()
    assert logit.grad is not None
    assert logit.grad.item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("u", [0.0, 1.0])
def test_noise_at_its_ends_gives_finite_gates_and_gradients(u: float, dtype: torch.dtype):
    # torch.rand yields exact zeros
    logit = torch.tensor([-9.5, 0.0, 9.5], dtype=dtype, requires_grad=True)
    gates = sample_gate(logit, torch.full((3,), u, dtype=dtype))
    gates.sum().backward()
    assert logit.grad is not None
    assert torch.isfinite(gates).all()
    assert torch.isfinite(logit.grad).all()
    expected = [naive_gate(alpha, 1e-4 if u == 0 else 1 - 1e-4) for alpha in (-9.5, 0.0, 9.5)]
    assert gates.tolist() == pytest.approx(expected, abs=1e-3 if dtype == torch.float32 else 1e-9)
