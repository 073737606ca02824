"""Movement against a full fine-tuning of a copy."""

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_fps.calibration import Pass, run_model
from peft_fps.gradients import Exact, Weight, accumulate_movement
from peft_fps.gradients.trial import Trial
from peft_fps.sparse import Layout
from tests.support.helpers import bits, images, normal, tiny_conv, tiny_gpt2, tiny_mlp, tokens, unchanged


RATE = 0.003


def without_dropout(model: nn.Module) -> Any:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def classified(inputs: Callable[[int], Tensor], classes: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(inputs(seed), torch.randint(classes, (4,), generator=generator)) for seed in range(4)]


def sentences() -> list[dict[str, Tensor]]:
    found = [tokens(seed=seed) for seed in range(4)]
    return [{"input_ids": ids, "labels": ids} for ids in found]


BLOCKS = [f"transformer.h.{block}.{path}" for block in (0, 1) for path in ("attn.c_attn", "mlp.c_fc", "mlp.c_proj")]

CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[Any]], list[str], list[str]]] = {
    # model, batches, scored modules, parameters trained along
    "linear": (
        tiny_mlp,
        lambda: classified(lambda seed: normal(4, 10, seed=seed), 4),
        ["first"],
        ["first.bias", "last.weight", "last.bias"],
    ),
    "conv2d": (
        tiny_conv,
        lambda: classified(lambda seed: images(4, seed), 5),
        ["stem", "grouped", "odd"],
        ["stem.bias", "grouped.bias"],
    ),
    "conv1d": (tiny_gpt2, sentences, BLOCKS, ["transformer.h.0.mlp.c_fc.bias"]),
}


def weights_of(model: nn.Module, paths: list[str]) -> dict[str, Weight]:
    modules = {path: model.get_submodule(path) for path in paths}
    return {path: Weight(module.weight, Layout(isinstance(module, Conv1D))) for path, module in modules.items()}  # type: ignore[arg-type]


def task(model: nn.Module, batch: Any) -> Tensor:
    outputs = run_model(model, batch)
    return outputs.loss if hasattr(outputs, "loss") else F.cross_entropy(outputs, batch[1])


def naive_movement(
    model: nn.Module, paths: list[str], others: list[str], batches: list[Any], rate: float
) -> dict[str, Tensor]:
    """Full fine-tuning of a copy as everyone would write it; |w_T - w_0| as `(neurons, inputs)`."""
    plain = copy.deepcopy(model).train()
    plain.requires_grad_(False)
    trained = [plain.get_parameter(name) for name in [f"{path}.weight" for path in paths] + others]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    for batch in batches:
        optimizer.zero_grad()
        (plain(**batch).loss if isinstance(batch, dict) else F.cross_entropy(plain(batch[0]), batch[1])).backward()
        optimizer.step()
    changes = {}
    for path in paths:
        module = plain.get_submodule(path)
        change = (module.weight - model.get_submodule(path).weight).abs().detach()
        changes[path] = change.t() if isinstance(module, Conv1D) else change.flatten(1)
    return changes


def moved(
    model: nn.Module, paths: list[str], others: list[str], data: Any, *, rate: float = RATE, **options: Any
) -> tuple[dict[str, Tensor], dict[str, int]]:
    held = {path: Exact() for path in paths}
    counts = accumulate_movement(
        model,
        weights_of(model, paths),
        {f"{name} along": model.get_parameter(name) for name in others},
        Pass(data, progress=False, **options),
        task,
        held,
        learning_rate=rate,
    )
    totals = {path: accumulator.total for path, accumulator in held.items()}
    return {path: total for path, total in totals.items() if total is not None}, counts


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("kind", CASES)
def test_movement_is_that_of_a_full_fine_tuning(kind: str, epochs: int):
    build, batches, paths, others = CASES[kind]
    # float64, since a first step of Adam has the size of the rate however small the gradient is
    model = without_dropout(build()).double()
    data = [as_double(batch) for batch in batches()]
    expected = naive_movement(model, paths, others, data * epochs, RATE)
    with unchanged(model):
        found, counts = moved(model, paths, others, data, epochs=epochs)
    assert counts == {"batches": 4 * epochs, "examples": 16 * epochs}
    assert set(found) == set(paths)
    for path in paths:
        assert found[path].dtype == torch.float32
        assert found[path].max() > RATE / 2
        torch.testing.assert_close(found[path], expected[path].float(), rtol=1e-5, atol=1e-9)


def as_double(batch: Any) -> Any:
    return (batch[0].double(), batch[1]) if isinstance(batch, tuple) else batch


def test_a_bias_that_two_modules_share_is_trained_once():
    model = tiny_mlp(6, 6, 6).double()
    model.last.bias = model.first.bias
    data = [as_double(batch) for batch in classified(lambda s: normal(4, 6, seed=s), 6)]
    expected = naive_movement(model, ["first"], ["first.bias"], data, RATE)
    with unchanged(model):
        found, _ = moved(model, ["first"], ["first.bias", "last.bias"], data)
    torch.testing.assert_close(found["first"], expected["first"].float(), rtol=1e-5, atol=1e-9)


def test_without_others_biases_and_head_stand_still():
    model, data = tiny_mlp().double(), [as_double(batch) for batch in CASES["linear"][1]()]
    alone = naive_movement(model, ["first"], [], data, RATE)
    found, _ = moved(model, ["first"], [], data)
    torch.testing.assert_close(found["first"], alone["first"].float(), rtol=1e-5, atol=1e-9)
    together, _ = moved(model, ["first"], ["last.weight"], data)
    assert not torch.allclose(found["first"], together["first"], rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_weights_move_by_steps_that_they_could_not_hold(dtype: torch.dtype):
    rate, model = 1e-5, tiny_mlp().to(dtype)
    nn.init.constant_(model.first.weight, 1.0)
    data = [(batch[0].to(dtype), batch[1]) for batch in CASES["linear"][1]()]
    found, _ = moved(model, ["first"], [], data, rate=rate)
    change = found["first"]
    assert torch.equal((1 - change).to(dtype), torch.ones_like(change).to(dtype))  # lost in the weight's own dtype
    assert (change > 0).all()
    assert 0.5 * rate < change.mean() <= change.max() < 4.01 * rate


def test_a_module_that_no_batch_reaches_is_left_out():
    model = tiny_mlp()
    model.spare = nn.Linear(3, 3)
    found, _ = moved(model, ["first", "spare"], [], CASES["linear"][1]())
    assert set(found) == {"first"}


def test_at_most_one_gradient_is_alive(monkeypatch: pytest.MonkeyPatch):
    build, batches, paths, others = CASES["conv1d"]
    model, alive, step = build(), [], Trial.step
    given: list[weakref.ref[Tensor]] = []

    def watched(trial: Trial, gradient: Tensor) -> None:
        held = sum(parameter.grad is not None for parameter in model.parameters())
        held += sum(reference() is not None for reference in given)
        alive.append(held)
        given.append(weakref.ref(gradient))
        step(trial, gradient)

    monkeypatch.setattr(Trial, "step", watched)
    moved(model, paths, others, batches())
    assert alive == [0] * 4 * (len(paths) + len(others))
    assert all(reference() is None for reference in given)


def test_training_that_diverges_in_its_last_step_is_refused():
    class Explosive(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient * torch.inf

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(10, 4)

        def forward(self, x: Tensor) -> Tensor:
            return Explosive.apply(self.first(x))

    model = Model()
    before = model.first.weight.data_ptr(), bits(model.first.weight)
    with pytest.raises(ValueError, match="first: the changes of its weight hold NaN or infinity"):
        moved(model, ["first"], [], CASES["linear"][1]()[:1])
    assert (model.first.weight.data_ptr(), bits(model.first.weight)) == before
