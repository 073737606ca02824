"""Sums of gradients over batches against a plain training loop, and that the model is left as it was."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor, nn

from peft_fps import FPSConfig
from peft_fps.calibration import Pass
from peft_fps.gradients import BatchLoss, Exact, accumulate_gradients
from tests.gradients.naive_sums import (
    BACKWARD,
    CASES,
    ENABLING,
    examples_of,
    labelled_images,
    loss_in_bfloat16,
    matrix,
    naive_sums,
    pairs,
    plain_loss,
    texts,
    weights_of,
    with_dropout,
)
from tests.gradients.restoration import left_as_it_was
from tests.support.helpers import bits, images, layers_of, tiny_llama, tiny_mlp, tiny_vit


def accumulated(
    base: nn.Module,
    batches: Any,
    head: str = "none",
    loss: BatchLoss = plain_loss,
    square: bool = False,
    **options: Any,
) -> tuple[dict[str, Tensor], dict[str, int]]:
    def term(path: str, gradient: Tensor) -> Tensor:
        return gradient.square() if square else gradient

    weights = weights_of(base, head)
    held = {path: Exact() for path in weights}
    counts = accumulate_gradients(base, weights, Pass(batches, progress=False), loss, held, term=term, **options)
    return {path: sums.total for path, sums in held.items()}, counts


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-5) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], tensor, rtol=rtol, atol=rtol * float(tensor.abs().max()))


# --- sums ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("square", "per_example"),
    [(False, False), (True, True), (True, False)],
    ids=["gradients", "squares-of-examples", "squares-of-batches"],
)
@pytest.mark.parametrize("kind", CASES)
def test_sums_of_gradients_and_of_their_squares(kind: str, square: bool, per_example: bool):
    build, batches, head = CASES[kind]
    singles = [example for batch in batches() for example in examples_of(batch)]
    found, counts = accumulated(build(), batches(), head, square=square, per_example=per_example)
    assert_close(found, naive_sums(build(), singles if per_example else batches(), head, square))
    assert counts == {"batches": 3, "examples": 18 if kind == "mlp" else 12}
    assert len(singles) == counts["examples"]


@pytest.mark.parametrize("kind", CASES)
def test_without_zero_grad_autograd_adds_up_the_same(kind: str):
    """GPS's way: one backward pass after the other, and the gradients are what has added up."""
    build, batches, head = CASES[kind]
    base = build().requires_grad_(True)
    for batch in batches():
        plain_loss(base, batch).backward()
    expected = {path: matrix(base.get_submodule(path), w.parameter.grad) for path, w in weights_of(base, head).items()}
    assert_close(accumulated(build(), batches(), head)[0], expected)


def test_bfloat16_gradients_are_summed_in_float32():
    batches = [(x.bfloat16(), y) for x, y in pairs((6, 10), 4, count=40)]
    found, _ = accumulated(tiny_mlp().bfloat16(), batches)
    assert_close(found, naive_sums(tiny_mlp().bfloat16(), batches, "none"), rtol=1e-6)
    in_bfloat16 = {path: torch.zeros_like(total, dtype=torch.bfloat16) for path, total in found.items()}
    for batch in batches:
        for path, total in naive_sums(tiny_mlp().bfloat16(), [batch], "none").items():
            in_bfloat16[path] += total.bfloat16()
    with pytest.raises(AssertionError):
        assert_close(found, {path: total.float() for path, total in in_bfloat16.items()}, rtol=1e-3)


def test_under_autocast():
    expected = naive_sums(tiny_vit(), labelled_images(), "classifier", loss=loss_in_bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = accumulated(tiny_vit(), labelled_images(), "classifier")
        assert torch.is_autocast_cache_enabled()
    assert_close(found, expected)
    with pytest.raises(AssertionError):
        assert_close(found, naive_sums(tiny_vit(), labelled_images(), "classifier"), rtol=1e-4)


@pytest.mark.parametrize("surroundings", [torch.no_grad, torch.inference_mode])
def test_where_gradients_are_off(surroundings: Any):
    model, batches = tiny_mlp(), CASES["mlp"][1]()
    with surroundings():
        found, _ = accumulated(model, batches)
    assert_close(found, naive_sums(tiny_mlp(), CASES["mlp"][1](), "none"))


@ENABLING
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("kind", ["vit", "llama", "gpt2"])
def test_gradient_checkpointing_changes_memory_alone(kind: str, training: bool):
    build, batches, head = CASES[kind]
    found = []
    for enabled in (False, True):
        model, calls = with_dropout(build(), 0.2), []
        if enabled:
            model.gradient_checkpointing_enable()
        inner = next(m for name, m in model.named_modules() if name.endswith(("mlp.fc1", "mlp.up_proj", "mlp.c_fc")))
        inner.register_forward_pre_hook(lambda *_, calls=calls: calls.append(torch.is_grad_enabled()))
        torch.manual_seed(0)
        found.append(accumulated(model, batches(), head, training=training)[0])
        assert calls == [True] * (6 if enabled else 3)
    assert_close(found[1], found[0])


def test_training_mode_is_what_it_says():
    def noisy() -> nn.Module:
        return nn.Sequential(tiny_mlp(), nn.Dropout(0.5))

    torch.manual_seed(0)
    expected = naive_sums(noisy().train(), CASES["mlp"][1](), "none")
    torch.manual_seed(0)
    assert_close(accumulated(noisy(), CASES["mlp"][1](), training=True)[0], expected)
    assert_close(
        accumulated(noisy().train(), CASES["mlp"][1]())[0], naive_sums(noisy().eval(), CASES["mlp"][1](), "none")
    )


# --- refusals --------------------------------------------------------------------------------------------------------


def exploding(model: nn.Module, batch: Any) -> Tensor:
    """A finite loss whose gradient is not: the square root at zero."""
    return (model(batch[0]) * 0).abs().sum().sqrt()


def loss_that_is_nan_in_batch_1() -> BatchLoss:
    calls = iter(range(9))
    return lambda model, batch: plain_loss(model, batch) * (torch.nan if next(calls) == 1 else 1.0)


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        pytest.param(lambda: loss_that_is_nan_in_batch_1(), ValueError, "batch 1 is nan", id="nan"),
        pytest.param(
            lambda: exploding, ValueError, r"(first|last): the gradients .*NaN or inf.*Nothing", id="gradient"
        ),
        pytest.param(lambda: lambda model, batch: model(batch[0]), ValueError, r"shape \(6, 4\)", id="not-a-scalar"),
        pytest.param(lambda: lambda *_: 1.0, TypeError, "batch 0 is of type float", id="a-number"),
        pytest.param(lambda: lambda *_: torch.ones(()), ValueError, "does not require grad", id="no-graph"),
    ],
)
def test_losses_and_gradients_that_are_not_fit(loss: Callable[[], BatchLoss], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        accumulated(tiny_mlp(), CASES["mlp"][1](), loss=loss())


def test_no_batch():
    with pytest.raises(ValueError, match="holds no batch"):
        accumulated(tiny_mlp(), [])


# --- nothing is left behind ------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """Running statistics, a buffer that is replaced in every forward, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8)
        self.second, self.drop, self.head = nn.Linear(8, 7), nn.Dropout(0.3), nn.Linear(7, 5)
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.fails_at: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen = self.seen + 1
        x = self.second(self.norm(self.first(x)).mean((2, 3)))
        if self.fails_at == 0:
            raise OSError("in forward")
        self.fails_at = None if self.fails_at is None else self.fails_at - 1
        random.random()
        np.random.rand()
        return self.head(self.drop(x.relu()))


def noisy_adapted(importance: str) -> Any:
    """In a mixture of modes, with gradients from before, hooks and an adapter beside the one to be calibrated."""
    model = get_peft_model(Noisy(), FPSConfig(per_neuron=2, importance=importance, modules_to_save=["head"]))
    model.add_adapter("other", FPSConfig(per_neuron=1, importance="magnitude"))
    model.train()
    model.base_model.model.drop.eval()
    base = model.get_base_model()
    base.second.base_layer.weight.grad = torch.ones(7, 8)
    base.norm.weight.requires_grad_(True)
    base.norm.weight.grad = torch.ones(8)
    base.second.register_forward_hook(lambda *_: None)
    for name, parameter in model.named_parameters():
        if "fps_values.default" in name or "modules_to_save" in name:
            parameter.grad = torch.full_like(parameter, 2.0)
    return model


def noisy_batches(fails: str) -> Iterator[tuple[Tensor, Tensor]]:
    for i in range(3):
        if i == 1 and fails == "data":
            raise OSError("in the data")
        yield images(4, seed=i), torch.arange(i, i + 4) % 5


def failing_loss(fails: str) -> Callable[[Any, Any], Tensor]:
    calls = iter(range(99))

    def loss(outputs: Tensor, batch: Any) -> Tensor:
        call = next(calls)
        if call >= 1 and fails == "loss":
            raise ZeroDivisionError("in the loss")
        if call >= 1 and fails == "keyboard":
            raise KeyboardInterrupt
        if call >= 1 and fails == "nan":
            return outputs.sum() * torch.nan
        if call >= 1 and fails == "backward":
            outputs.register_hook(lambda gradient: [][0])
        return F.cross_entropy(outputs, batch[1])

    return loss


@pytest.mark.parametrize("fails", ["loss", "keyboard", "nan", "backward", "forward", "data"])
@pytest.mark.parametrize(
    ("importance", "training_mode"),
    [(name, mode) for name in BACKWARD for mode in (False, True) if name != "fisher" or not mode],
)
def test_a_failure_leaves_everything_as_it_was(importance: str, fails: str, training_mode: bool):
    """Not of single examples in training mode, which have no batch statistics."""
    model = noisy_adapted(importance)
    model.get_base_model().fails_at = 1 if fails == "forward" else None
    with left_as_it_was(model), pytest.raises((ZeroDivisionError, KeyboardInterrupt, ValueError, IndexError, OSError)):
        model.calibrate(
            noisy_batches(fails),
            adapter_name="default",
            progress=False,
            loss=failing_loss(fails),
            training_mode=training_mode,
        )


@pytest.mark.parametrize("training_mode", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize(
    "options", [{"importance": "gradient"}, {"importance": "fisher", "fisher": "batch"}, {"importance": "sensitivity"}]
)
def test_success_changes_the_adapter_alone(options: dict[str, Any], training_mode: bool):
    model = noisy_adapted("gradient")
    for name, value in options.items():
        setattr(model.peft_config["default"], name, value)
    with left_as_it_was(model, but_for_selection=True):
        model.calibrate(noisy_batches(""), adapter_name="default", progress=False, training_mode=training_mode)
    assert all(bits(p) == bytes(p.numel() * 4) for n, p in model.named_parameters() if "fps_" in n and "default" in n)


@ENABLING
def test_checkpointing_survives_a_failure():
    model = get_peft_model(tiny_llama(), FPSConfig(per_neuron=2, importance="gradient"))
    model.get_base_model().gradient_checkpointing_enable()

    def interrupted(outputs: Any, batch: Any) -> Tensor:
        raise KeyboardInterrupt

    with left_as_it_was(model), pytest.raises(KeyboardInterrupt):
        model.calibrate(texts("tokens"), progress=False, loss=interrupted)


def test_adapters_and_saved_modules_get_no_gradient():
    model = get_peft_model(tiny_vit(), FPSConfig(per_neuron=2, importance="gradient"))
    assert any("modules_to_save" in name for name, p in model.named_parameters() if p.requires_grad)
    required: list[list[str]] = []

    def loss(outputs: Any, batch: Any) -> Tensor:
        required.append([name for name, p in model.named_parameters() if p.requires_grad])
        assert all(p.grad is None for p in model.parameters())
        return outputs.loss

    model.calibrate(labelled_images(), progress=False, loss=loss)
    targeted = [f"base_model.model.{path}.base_layer.weight" for path in layers_of(model)]
    assert required == [targeted] * 3
    assert all(parameter.grad is None for parameter in model.parameters())
