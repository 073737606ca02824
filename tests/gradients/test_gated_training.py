"""Gated changes against autograd of the loss written out."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from peft_fps.calibration import Pass
from peft_fps.gradients import Exact, Weight, accumulate_gated_changes
from peft_fps.gradients.gated_training import GATE_LEARNING_RATE, GatedChange
from tests.gradients.naive_sums import gradients_alive_in_steps, plain_loss
from tests.support.helpers import bits, normal, tiny_mlp, unchanged


RATE = 0.01


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Gates and dropout draw from torch's global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def naive_gate(alpha: Tensor, u: Tensor) -> Tensor:
    """Louizos et al. 2018, equations 10 and 11, with DiffPruning's interval and bounds of the noise."""
    u = u.clamp(1e-4, 1 - 1e-4)
    return (torch.sigmoid(torch.log(u / (1 - u)) + alpha) * 3 - 1.5).clamp(0, 1)


def naive_typical(alpha: Tensor) -> Tensor:
    return (torch.sigmoid(alpha) * 3 - 1.5).clamp(0, 1)


class WrittenOut:
    """DiffPruning of some weights as one loss, all of it differentiated by autograd, in float64."""

    def __init__(self, weights: dict[str, Tensor], others: dict[str, Tensor], rate: float, penalty: float) -> None:
        self.weights = {name: weight.detach().double() for name, weight in weights.items()}
        self.change = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
        self.alpha = {name: torch.full_like(weight, 5.0) for name, weight in self.weights.items()}
        self.whole = {name: torch.tensor(5.0, dtype=torch.float64) for name in weights}
        self.others = {name: other.detach().double().clone() for name, other in others.items()}
        slow, fast = [*self.change.values(), *self.others.values()], [*self.alpha.values(), *self.whole.values()]
        for tensor in slow + fast:
            tensor.requires_grad_(True)
        groups = [{"params": slow, "lr": rate}, {"params": fast, "lr": 0.1}]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        self.penalty = penalty

    def step(self, loss: Any, noise: dict[str, tuple[Tensor, Tensor]]) -> None:
        """One step on loss({name: W + w * z * zg} | others) + penalty * sum of open probabilities."""
        shown = dict(self.others)
        for name, (own, whole) in noise.items():
            gate = naive_gate(self.alpha[name], own.double()) * naive_gate(self.whole[name], whole.double())
            shown[name] = self.weights[name] + self.change[name] * gate
        opened = sum(torch.sigmoid(a).sum() for a in [*self.alpha.values(), *self.whole.values()])
        self.optimizer.zero_grad()
        (loss(shown) + self.penalty * opened).backward()
        self.optimizer.step()

    def size(self, name: str) -> Tensor:
        gates = naive_typical(self.alpha[name]) * naive_typical(self.whole[name])
        return (self.change[name] * gates).abs().detach()


def scripted(monkeypatch: pytest.MonkeyPatch, noises: list[Tensor]) -> None:
    """Let torch.rand_like return these tensors, one after the other."""
    left = iter(noises)

    def rand_like(like: Tensor) -> Tensor:
        noise = next(left)
        assert noise.shape == like.shape
        return noise.to(like.dtype)

    monkeypatch.setattr(torch, "rand_like", rand_like)


@pytest.mark.parametrize("penalty", [0.0, 0.003, 1.0])
def test_steps_are_those_of_the_loss_written_out(penalty: float, monkeypatch: pytest.MonkeyPatch):
    weight, x, y = normal(3, 4), normal(8, 4, seed=1).double(), normal(8, 3, seed=2).double()
    gated = GatedChange(weight, RATE, penalty)
    reference = WrittenOut({"w": weight}, {}, RATE, penalty)
    starts = normal(3, 4, seed=3), normal(3, 4, seed=4)
    for found, expected, start in zip(
        (gated.change, gated.logit, gated.whole_logit),
        (reference.change["w"], reference.alpha["w"], reference.whole["w"]),
        (*starts, torch.tensor(0.4)),  # where gates are half open, so that gradients pass
        strict=True,
    ):
        found.data.copy_(start)
        expected.data.copy_(start)
    generator = torch.Generator().manual_seed(0)
    noises = [(torch.rand(3, 4, generator=generator), torch.rand((), generator=generator)) for _ in range(12)]
    scripted(monkeypatch, [noise for pair in noises for noise in pair])

    def loss(shown: dict[str, Tensor]) -> Tensor:
        return F.mse_loss(x @ shown["w"].t(), y)

    for pair in noises:
        delta = gated.sample()
        assert not delta.requires_grad
        shown = (weight.double() + delta.double()).requires_grad_()
        gradient = torch.autograd.grad(loss({"w": shown}), shown)[0]
        gated.step(gradient.float())
        reference.step(loss, {"w": pair})
        torch.testing.assert_close(gated.change.double(), reference.change["w"], rtol=0, atol=2e-5)
        torch.testing.assert_close(gated.logit.double(), reference.alpha["w"], rtol=0, atol=2e-4)
        torch.testing.assert_close(gated.whole_logit.double(), reference.whole["w"], rtol=0, atol=2e-4)
    assert (gated.whole_logit - 0.4).abs() > 0.01  # it took part
    torch.testing.assert_close(gated.size().double(), reference.size("w"), rtol=0, atol=2e-4)


def test_gates_start_open_and_changes_at_zero():
    gated = GatedChange(normal(3, 4, dtype=torch.bfloat16), RATE, 0.0)
    assert gated.change.dtype == torch.float32
    assert not gated.sample().any()
    assert (gated.logit == 5).all()
    assert gated.whole_logit.shape == ()
    assert gated.whole_logit == 5
    assert not gated.size().any()


def test_a_step_needs_no_gradient_mode(monkeypatch: pytest.MonkeyPatch):
    gated = GatedChange(normal(3, 4), RATE, 0.0)
    scripted(monkeypatch, [torch.full((3, 4), 0.5), torch.tensor(0.5)])
    with torch.no_grad():
        gated.sample()
        gated.step(torch.ones(3, 4))
    assert gated.change.tolist() == [pytest.approx([-RATE] * 4)] * 3
    assert gated.change.grad is None
    assert gated.logit.grad is None


def test_the_rates_are_those_of_changes_and_gates(monkeypatch: pytest.MonkeyPatch):
    gated = GatedChange(torch.zeros(1, 1), RATE, 1.0)
    scripted(monkeypatch, [torch.tensor([[0.5]]), torch.tensor(0.5)])
    gated.sample()
    gated.step(torch.tensor([[2.0]]))
    assert gated.change.item() == pytest.approx(-RATE)  # Adam's first step has the size of its rate
    assert gated.logit.item() == pytest.approx(5 - 0.1)
    assert gated.whole_logit.item() == pytest.approx(5 - 0.1)
    assert GATE_LEARNING_RATE == 0.1


def test_changes_behind_shut_gates_come_last_and_keep_an_order():
    gated = GatedChange(torch.zeros(2, 3), RATE, 0.0)
    gated.change.data = torch.tensor([[1.0, 2.0, 3.0], [-4.0, 0.01, 5.0]])
    gated.logit.data = torch.tensor([[-1.0, -1.0, -9.0], [-1.0, 0.1, -0.5]])
    assert (naive_typical(gated.logit.detach()) > 0).tolist() == [[False] * 3, [False, True, False]]
    size = gated.size().flatten()
    worth = gated.change.detach().abs() * torch.sigmoid(gated.logit.detach())
    worth[1, 1] = torch.inf  # the open one
    assert size.argsort(descending=True).tolist() == worth.flatten().argsort(descending=True).tolist()
    assert size[4].item() == pytest.approx(0.01 * naive_typical(torch.tensor(0.1)).item())
    assert len(set(size.tolist())) == 6
    gated.whole_logit.data.fill_(-4.0)
    assert gated.size().flatten().argsort().tolist() == size.argsort().tolist()
    assert gated.size().max() < size[size > 0].max() * 1e-5


# --- what the penalty does ------------------------------------------------------------------------------------------


def regression(penalty: float, steps: int = 150) -> tuple[GatedChange, Tensor]:
    """Learn gated changes of a linear student whose teacher differs in 12 of 400 weights."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(20, 20, generator=generator) / 20**0.5
    relevant = torch.zeros(400, dtype=torch.bool)
    relevant[torch.randperm(400, generator=generator)[:12]] = True
    relevant = relevant.view(20, 20)
    teacher = weight + relevant
    gated = GatedChange(weight, 0.02, penalty)
    for _ in range(steps):
        x = torch.randn(64, 20, generator=generator)
        shown = (weight + gated.sample()).requires_grad_()
        gradient = torch.autograd.grad(F.mse_loss(x @ shown.t(), x @ teacher.t()), shown)[0]
        gated.step(gradient)
    return gated, relevant


def test_the_penalty_closes_gates_of_weights_without_use():
    gated, relevant = regression(penalty=1e-3)
    free, _ = regression(penalty=0.0)
    shut = naive_typical(gated.logit.detach()) == 0
    assert shut[~relevant].float().mean() > 0.9
    assert shut[relevant].float().mean() < 0.1
    assert naive_typical(gated.whole_logit.detach()) > 0
    assert (naive_typical(free.logit.detach()) == 0)[~relevant].float().mean() < 0.5
    size = gated.size()
    assert size[~relevant].max() < size[relevant].min()


# --- models ---------------------------------------------------------------------------------------------------------


def batches(count: int = 4) -> list[tuple[Tensor, Tensor]]:
    return [(normal(4, 10, seed=seed).double(), torch.tensor([0, 1, 2, 3])) for seed in range(count)]


def gated_sizes(model: Any, data: list[Any], *, penalty: float, **options: Any) -> tuple[dict[str, Tensor], Any]:
    weights = {name: Weight(getattr(model, name).weight) for name in ("first", "last")}
    others = {name: model.get_parameter(name) for name in ("first.bias", "last.bias")}
    held = {name: Exact() for name in weights}
    counts = accumulate_gated_changes(
        model,
        weights,
        others,
        Pass(data, progress=False, **options),
        plain_loss,
        held,
        learning_rate=RATE,
        penalty=penalty,
    )
    return {name: exact.total for name, exact in held.items() if exact.total is not None}, counts


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("penalty", [1.25e-7, 0.01])
def test_a_model_learns_as_the_loss_written_out(penalty: float, epochs: int):
    model, data = tiny_mlp().double(), batches()
    parameters = dict(model.named_parameters())
    weights = {name: parameters[name] for name in ("first.weight", "last.weight")}
    others = {name: parameters[name] for name in ("first.bias", "last.bias")}
    reference = WrittenOut(weights, others, RATE, penalty)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        for x, y in data * epochs:
            # float32 and in the order of the weights: the noise that a seeded run draws
            noise = {n: (torch.rand(w.shape), torch.rand(())) for n, w in weights.items()}
            reference.step(lambda shown, x=x, y=y: F.cross_entropy(functional_call(model, shown, (x,)), y), noise)
        torch.manual_seed(7)
        with unchanged(model):
            found, counts = gated_sizes(model, data, penalty=penalty, epochs=epochs)
    assert counts == {"batches": 4 * epochs, "examples": 16 * epochs}
    for name in ("first", "last"):
        expected = reference.size(f"{name}.weight")
        assert expected.max() > RATE / 2
        torch.testing.assert_close(found[name].double(), expected, rtol=0, atol=2e-4 * RATE * epochs * 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_weights_change_by_steps_that_they_could_not_hold(dtype: torch.dtype):
    model = tiny_mlp().to(dtype)
    nn.init.constant_(model.first.weight, 256.0)
    before = bits(model.first.weight)
    found, _ = gated_sizes(model, [(x.to(dtype), y) for x, y in batches()], penalty=0.0)
    assert bits(model.first.weight) == before
    assert found["first"].dtype == torch.float32
    assert 0 < found["first"].max() < 4.01 * RATE
    assert ((256 + found["first"]).to(dtype) == 256).all()


def test_at_most_one_gradient_is_alive(monkeypatch: pytest.MonkeyPatch):
    model = tiny_mlp().double()
    alive, given = gradients_alive_in_steps(monkeypatch, GatedChange, model)
    gated_sizes(model, batches(), penalty=0.0)
    assert alive == [0] * 8
    assert all(reference() is None for reference in given)


def test_a_module_that_no_batch_reaches_is_left_out():
    class Shortcut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(10, 4), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x)

    found, _ = gated_sizes(Shortcut().double(), batches(), penalty=0.1)
    assert set(found) == {"first"}


def test_training_that_diverges_in_its_last_step_is_refused():
    model = tiny_mlp().double()
    before = {name: (p.data_ptr(), bits(p)) for name, p in model.named_parameters()}
    model.last.weight.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(ValueError, match="last: the changes of its weight hold NaN or infinity"):
        gated_sizes(model, batches(1), penalty=0.0)
    assert {name: (p.data_ptr(), bits(p)) for name, p in model.named_parameters()} == before
