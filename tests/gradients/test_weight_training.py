"""Movement against a full fine-tuning of a copy."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peft_fps.calibration import Pass
from peft_fps.gradients import Exact, accumulate_movement
from peft_fps.gradients.trial import Trial
from tests.gradients.naive_sums import (
    CASES,
    as_double,
    gradients_alive_in_steps,
    matrix,
    naive_movement,
    pairs,
    plain_loss,
    weights_of,
    with_dropout,
)
from tests.support.helpers import bits, tiny_mlp, unchanged


RATE = 0.003
BLOCKS = [f"transformer.h.{block}.{path}" for block in (0, 1) for path in ("attn.c_attn", "mlp.c_fc", "mlp.c_proj")]

TRAINED: dict[str, tuple[list[str], list[str]]] = {
    # scored modules, parameters trained along
    "mlp": (["first"], ["first.bias", "last.weight", "last.bias"]),
    "conv": (["stem", "grouped", "odd"], ["stem.bias", "grouped.bias"]),
    "gpt2": (BLOCKS, ["transformer.h.0.mlp.c_fc.bias"]),
}


def expected_movement(model: nn.Module, paths: list[str], others: list[str], batches: list[Any]) -> dict[str, Tensor]:
    """As float32 and `(neurons, inputs)`."""
    changes = naive_movement(model, [f"{path}.weight" for path in paths] + others, batches, RATE)
    return {path: matrix(model.get_submodule(path), changes[f"{path}.weight"]).float() for path in paths}


def moved(
    model: nn.Module, paths: list[str], others: list[str], data: Any, *, rate: float = RATE, **options: Any
) -> tuple[dict[str, Tensor], dict[str, int]]:
    held = {path: Exact() for path in paths}
    counts = accumulate_movement(
        model,
        {path: weight for path, weight in weights_of(model).items() if path in paths},
        {f"{name} along": model.get_parameter(name) for name in others},
        Pass(data, progress=False, **options),
        plain_loss,
        held,
        learning_rate=rate,
    )
    totals = {path: accumulator.total for path, accumulator in held.items()}
    return {path: total for path, total in totals.items() if total is not None}, counts


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("kind", TRAINED)
def test_movement_is_that_of_a_full_fine_tuning(kind: str, epochs: int):
    (build, batches, _), (paths, others) = CASES[kind], TRAINED[kind]
    # float64, since a first step of Adam has the size of the rate however small the gradient is
    model, data = with_dropout(build(), 0.0).double(), as_double(batches())
    expected = expected_movement(model, paths, others, data * epochs)
    with unchanged(model):
        found, counts = moved(model, paths, others, data, epochs=epochs)
    assert counts == {"batches": 3 * epochs, "examples": (18 if kind == "mlp" else 12) * epochs}
    assert set(found) == set(paths)
    for path in paths:
        assert found[path].dtype == torch.float32
        assert found[path].max() > RATE / 2
        torch.testing.assert_close(found[path], expected[path], rtol=1e-5, atol=1e-9)


def test_a_bias_that_two_modules_share_is_trained_once():
    model = tiny_mlp(6, 6, 6).double()
    model.last.bias = model.first.bias
    data = as_double(pairs((4, 6), 6))
    expected = expected_movement(model, ["first"], ["first.bias"], data)
    with unchanged(model):
        found, _ = moved(model, ["first"], ["first.bias", "last.bias"], data)
    torch.testing.assert_close(found["first"], expected["first"], rtol=1e-5, atol=1e-9)


def test_without_others_biases_and_head_stand_still():
    model, data = tiny_mlp().double(), as_double(CASES["mlp"][1]())
    alone = expected_movement(model, ["first"], [], data)
    found, _ = moved(model, ["first"], [], data)
    torch.testing.assert_close(found["first"], alone["first"], rtol=1e-5, atol=1e-9)
    together, _ = moved(model, ["first"], ["last.weight"], data)
    assert not torch.allclose(found["first"], together["first"], rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_weights_move_by_steps_that_they_could_not_hold(dtype: torch.dtype):
    rate, model = 1e-5, tiny_mlp().to(dtype)
    nn.init.constant_(model.first.weight, 1.0)
    data = [(x.to(dtype), y) for x, y in CASES["mlp"][1]()]
    found, _ = moved(model, ["first"], [], data, rate=rate)
    change = found["first"]
    assert torch.equal((1 - change).to(dtype), torch.ones_like(change).to(dtype))  # lost in the weight's own dtype
    assert (change > 0).all()
    assert 0.5 * rate < change.mean() <= change.max() < 3.01 * rate


def test_a_module_that_no_batch_reaches_is_left_out():
    model = tiny_mlp()
    model.spare = nn.Linear(3, 3)
    found, _ = moved(model, ["first", "spare"], [], CASES["mlp"][1]())
    assert set(found) == {"first"}


def test_at_most_one_gradient_is_alive(monkeypatch: pytest.MonkeyPatch):
    (build, batches, _), (paths, others) = CASES["gpt2"], TRAINED["gpt2"]
    model = build()
    alive, given = gradients_alive_in_steps(monkeypatch, Trial, model)
    moved(model, paths, others, batches())
    assert alive == [0] * 3 * (len(paths) + len(others))
    assert all(reference() is None for reference in given)


def test_training_that_diverges_in_its_last_step_is_refused():
    model = tiny_mlp()
    model.first.weight.register_hook(lambda gradient: gradient * torch.inf)
    before = model.first.weight.data_ptr(), bits(model.first.weight)
    with pytest.raises(ValueError, match="first: the changes of its weight hold NaN or infinity"):
        moved(model, ["first"], [], CASES["mlp"][1]()[:1])
    assert (model.first.weight.data_ptr(), bits(model.first.weight)) == before
