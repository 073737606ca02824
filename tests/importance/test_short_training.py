"""Selection by a short training, from end to end: what it finds, and that nothing of the training is left."""

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from peft_fps.importance import short_training
from tests.calibration import naive_fps
from tests.calibration.naive_fps import Rows, selection_of
from tests.gradients.naive_sums import CASES, ENABLING, as_double, naive_movement, with_dropout
from tests.gradients.restoration import left_as_it_was
from tests.support.helpers import (
    images,
    layers_of,
    normal,
    selected_columns,
    tiny_bert,
    tiny_conv,
    tiny_mlp,
    tiny_vit,
    unchanged,
    weighted_of,
)


IMPORTANCES = ["movement", "l0"]
KINDS = ["vit", "bert", "gpt2", "conv"]


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Gates and dropout draw from torch's global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def fresh(base: nn.Module, importance: str = "movement", **options: Any) -> Any:
    return naive_fps.fresh(base, importance=importance, **options)


def labels(batch: int, classes: int, seed: int = 0) -> Tensor:
    return torch.randint(classes, (batch,), generator=torch.Generator().manual_seed(seed))


def batches_of(kind: str) -> list[Any]:
    return CASES[kind][1]()


# --- planted changes ------------------------------------------------------------------------------------------------


PLANTED = 12


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.only = nn.Linear(20, 20)

    def forward(self, x: Tensor) -> Tensor:
        return self.only(x)


def linear_student(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Linear()


def with_planted(student: nn.Module, size: float, seed: int) -> tuple[nn.Module, dict[str, set[int]]]:
    """A teacher that differs in some weights of every linear layer by `size` standard deviations, and where."""
    teacher, places = copy.deepcopy(student), {}
    generator = torch.Generator().manual_seed(seed)
    for name, module in teacher.named_modules():
        if isinstance(module, nn.Linear):
            chosen = torch.randperm(module.weight.numel(), generator=generator)[:PLANTED]
            signs = torch.randint(2, (PLANTED,), generator=generator) * 2.0 - 1
            module.weight.data.view(-1)[chosen] += size * module.weight.std().item() * signs
            places[name] = set(chosen.tolist())
    return teacher, places


def taught(teacher: nn.Module, inputs: int, count: int, seed: int, batch: int = 32) -> list[tuple[Tensor, Tensor]]:
    drawn = [normal(batch, inputs, seed=1000 * seed + i) for i in range(count)]
    with torch.no_grad():
        return [(x, teacher(x)) for x in drawn]


def squared_error(outputs: Tensor, batch: Any) -> Tensor:
    return F.mse_loss(outputs, batch[1])


def recall(student: Callable[[int], nn.Module], size: float, count: int, **options: Any) -> float:
    """Share of the planted weights that are selected, of as many selected as planted, over three problems."""
    found = total = 0
    for seed in range(3):
        base = student(seed)
        teacher, places = with_planted(base, size, seed)
        model = fresh(base, per_neuron=PLANTED / 20, granularity="layer", **options)
        if model.peft_config["default"].needs_calibration:
            model.calibrate(taught(teacher, 20, count, seed), loss=squared_error, progress=False)
        for name, layer in layers_of(model).items():
            selected = {20 * row + column for row, columns in enumerate(selected_columns(layer)) for column in columns}
            assert len(selected) == PLANTED
            found, total = found + len(selected & places[name]), total + PLANTED
    return found / total


def two_layers(seed: int) -> nn.Module:
    del seed  # the teacher varies
    return tiny_mlp(20, 20, 20)


@pytest.mark.parametrize("size", [0.3, 3.0])
@pytest.mark.parametrize("importance", IMPORTANCES)
def test_defaults_find_changes_planted_in_a_linear_model(importance: str, size: float):
    assert recall(linear_student, size, 20, importance=importance) > 0.95


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_defaults_find_changes_planted_in_two_layers(importance: str):
    assert recall(two_layers, 0.1, 60, importance=importance) > 0.85


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_rate_and_epochs_that_cover_large_changes_find_them(importance: str):
    options: dict[str, Any] = {"importance": importance, "selection_learning_rate": 0.01}
    enough = recall(two_layers, 3.0, 20, selection_epochs=4, **options)
    assert enough > 0.95
    # rate times steps is how far a weight can get; without the way to the end, layers blame each other
    assert recall(two_layers, 3.0, 20, importance=importance, selection_learning_rate=1e-4) < enough - 0.2


def test_chance_finds_almost_nothing():
    assert recall(two_layers, 0.3, 0, importance="random") < 0.15


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("granularity", ["row", "column"])
def test_a_planted_neuron_or_input_is_found(granularity: str, importance: str):
    for seed in range(3):
        base = two_layers(seed)
        teacher = copy.deepcopy(base)
        planted = 7 + seed
        weight = teacher.first.weight.data
        part = weight[planted] if granularity == "row" else weight[:, planted]
        part += 0.1 * normal(20, seed=seed)
        # neurons that move by less than what is planted would share the blame
        options: dict[str, Any] = {"selection_learning_rate": 0.003, "target_modules": ["first"], "bias": "none"}
        model = fresh(base, importance, per_neuron=1, granularity=granularity, **options)
        model.calibrate(taught(teacher, 20, 60, seed), loss=squared_error, progress=False)
        expected = [list(range(20)) if row == planted else [] for row in range(20)]
        found = selected_columns(layers_of(model)["first"])
        assert found == (expected if granularity == "row" else [[planted]] * 20)


# --- models ---------------------------------------------------------------------------------------------------------


TEXTS = {"movement": "movement in a short fine-tuning", "l0": "change under hard-concrete gates"}


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("kind", KINDS)
def test_models_are_calibrated_within_their_budget(kind: str, importance: str):
    model = fresh(CASES[kind][0](), importance, budget=0.2, granularity="layer", selection_epochs=2)
    report = model.calibrate(batches_of(kind), progress=False)
    trained = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "fps_" in n)
    limit = int(report.base_parameters * 0.2)
    assert limit - len(layers_of(model)) < trained <= limit
    assert report.trained == trained
    assert TEXTS[importance] in str(report)
    assert "over 24 examples" in str(report)
    record = next(iter(layers_of(model).values())).fps_state["default"].calibration
    assert record is not None
    assert (record.importance, record.batches, record.examples) == (importance, 6, 24)
    assert record.selection_epochs == 2


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_the_same_seed_gives_the_same_selection(importance: str):
    def selected(seed: int) -> dict[str, Rows]:
        torch.manual_seed(seed)
        model = fresh(tiny_bert(), importance)
        model.calibrate(batches_of("bert"), progress=False)
        return selection_of(model)

    assert selected(0) == selected(0)
    assert selected(0) != selected(1)  # dropout is active


# --- what is trained along ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", ["none", "all", "with_norms"])
def test_movement_trains_targets_their_biases_and_the_head(bias: str):
    # float64, since a first step of Adam has the size of the rate however small the gradient is
    base = with_dropout(tiny_bert(), 0.0).double()
    plain = copy.deepcopy(base)
    model = fresh(base, bias=bias, selection_learning_rate=0.002, selection_epochs=2, per_neuron=4)
    linear = set(weighted_of(model))
    norms = set(layers_of(model)) - linear
    assert bool(norms) is (bias == "with_norms")
    trained = [f"{n}.weight" for n in linear] + ["classifier.weight", "classifier.bias"]
    biased = {n for n in linear if bias != "none" and not n.endswith("key")}
    trained += [f"{n}.bias" for n in biased | norms]
    data = batches_of("bert")
    changes = naive_movement(plain, trained, data * 2, 0.002)
    model.calibrate(data, progress=False)
    for name in linear:
        scores = changes[f"{name}.weight"]
        for row, columns in enumerate(selected_columns(layers_of(model)[name])):
            chosen, best = scores[row, columns].sort().values, scores[row].topk(4).values.sort().values
            torch.testing.assert_close(chosen, best, rtol=1e-5, atol=1e-10)


# --- restoration ----------------------------------------------------------------------------------------------------


class WithNorm(nn.Module):
    """Running statistics, dropout, a LayerNorm, and two modules outside the targets that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.body = nn.Linear(6, 8)
        self.layer_norm = nn.LayerNorm(8)
        self.drop = nn.Dropout(0.5)
        self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
        self.other.weight = self.one.weight
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu().mean((2, 3))
        x = self.drop(self.layer_norm(self.body(x)))
        return self.head(self.other(self.one(x)))


def adapted_with_norm(importance: str, bias: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = WithNorm()
    base.body.train(False)
    model = fresh(base, importance, bias=bias, target_modules=["stem", "body"], modules_to_save=["head"], per_neuron=2)
    base.one.weight.requires_grad_(True)  # as a user may leave it
    base.one.weight.grad = torch.full_like(base.one.weight, 0.25)
    base.stem.base_layer.weight.grad = torch.full_like(base.stem.base_layer.weight, 0.5)
    return model


def norm_batches(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    return [(images(4, i), labels(4, 5, i)) for i in range(count)]


BIASES = ["none", "all", "with_norms"]


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("bias", BIASES)
def test_success_leaves_the_model_as_it_was(importance: str, bias: str):
    model = adapted_with_norm(importance, bias)
    with left_as_it_was(model, but_for_selection=True):
        model.calibrate(norm_batches(), progress=False)
    parameters = [p for layer in layers_of(model).values() for p in layer.adapter_parameters("default")]
    assert not any(bool(parameter.any()) for parameter in parameters)


class Boom(Exception):
    pass


def failing_loss(error: BaseException, at: int) -> Callable[[Any, Any], Tensor]:
    calls = []

    def loss(outputs: Tensor, batch: Any) -> Tensor:
        calls.append(1)
        if len(calls) == at:
            random.random()
            np.random.random()
            raise error
        return F.cross_entropy(outputs, batch[1])

    return loss


@pytest.mark.parametrize("error", [Boom("stop"), KeyboardInterrupt("stop")], ids=["error", "interrupt"])
@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("bias", BIASES)
def test_an_exception_amid_the_training_leaves_everything(importance: str, bias: str, error: BaseException):
    model = adapted_with_norm(importance, bias)
    with left_as_it_was(model), pytest.raises(type(error), match="stop"):
        model.calibrate(norm_batches(), progress=False, loss=failing_loss(error, at=2))


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_an_exception_within_backward_leaves_everything(importance: str):
    model, calls = adapted_with_norm(importance, "all"), []

    def fail(gradient: Tensor) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise Boom("stop")

    def loss(outputs: Tensor, batch: Any) -> Tensor:
        features.register_hook(fail)
        return F.cross_entropy(outputs, batch[1])

    features = torch.empty(0)

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        nonlocal features
        features = output

    model.get_base_model().norm.register_forward_hook(keep)  # behind the head and the body, before the stem
    with left_as_it_was(model), pytest.raises(Boom, match="stop"):
        model.calibrate(norm_batches(), progress=False, loss=loss)


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_data_that_ends_with_an_error_or_is_empty_leaves_everything(importance: str):
    def interrupted() -> Iterator[Any]:
        yield norm_batches(1)[0]
        raise Boom("no more")

    model = adapted_with_norm(importance, "all")
    with left_as_it_was(model):
        with pytest.raises(Boom, match="no more"):
            model.calibrate(interrupted(), progress=False)
        with pytest.raises(ValueError, match="holds no batch"):
            model.calibrate([], progress=False)
        with pytest.raises(ValueError, match=r"loss of calibration batch 1 is nan"):
            model.calibrate([norm_batches(1)[0], (images() * torch.nan, labels(4, 5))], progress=False)


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_half_models_are_calibrated_and_left_as_they_were(importance: str):
    model = fresh(tiny_vit().bfloat16(), importance)
    data = [{**batch, "pixel_values": batch["pixel_values"].bfloat16()} for batch in batches_of("vit")]
    with left_as_it_was(model, but_for_selection=True):
        model.calibrate(data, progress=False)
    dtypes = {layer.base_layer.weight.dtype for layer in layers_of(model).values()}
    assert dtypes == {torch.bfloat16}


# --- data and processes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_an_iterator_cannot_serve_several_epochs(importance: str):
    model = fresh(tiny_conv(), importance, selection_epochs=2)
    message = rf"importance='{importance}' needs 2 passes over the data, found an iterator.* Pass a DataLoader"
    with unchanged(model), pytest.raises(ValueError, match=message):
        model.calibrate(iter(batches_of("conv")), progress=False)


def conv_loader() -> DataLoader:
    return DataLoader(TensorDataset(images(10), labels(10, 5)), batch_size=4, shuffle=True)


@pytest.mark.parametrize(
    ("data", "epochs", "num_batches", "expected"),
    [
        (lambda: batches_of("conv"), 3, None, (9, 36)),
        (conv_loader, 3, None, (9, 30)),
        (conv_loader, 2, 1, (2, 8)),
        (lambda: iter(batches_of("conv")), 1, None, (3, 12)),
    ],
    ids=["list", "loader", "loader-in-part", "iterator-once"],
)
@pytest.mark.parametrize("importance", IMPORTANCES)
def test_the_record_counts_batches_of_all_epochs(
    importance: str, data: Callable[[], Any], epochs: int, num_batches: int | None, expected: tuple[int, int]
):
    model = fresh(tiny_conv(), importance, selection_epochs=epochs)
    model.calibrate(data(), num_batches=num_batches, progress=False)
    record = layers_of(model)["stem"].fps_state["default"].calibration
    assert record is not None
    assert (record.batches, record.examples) == expected
    assert f"over {expected[1]} examples" in str(model.selection_report())


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_several_processes_are_refused(importance: str, monkeypatch: pytest.MonkeyPatch):
    model = fresh(tiny_conv(), importance)
    monkeypatch.setattr(short_training, "is_distributed", lambda: True)
    message = rf"importance='{importance}' trains for a while.* Select in one process"
    with unchanged(model), pytest.raises(ValueError, match=message):
        model.calibrate(batches_of("conv"), progress=False)


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_streaming_accumulators_are_refused(importance: str):
    model = fresh(tiny_conv(), importance)
    with unchanged(model), pytest.raises(ValueError, match=f"'streaming' was given with importance='{importance}'"):
        model.calibrate(batches_of("conv"), progress=False, accumulators="streaming")


# --- checkpointing, dropout, shared biases --------------------------------------------------------


@ENABLING
@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("kind", ["vit", "bert", "gpt2"])
def test_gradient_checkpointing_changes_nothing(kind: str, importance: str):
    def selected(checkpointing: bool) -> dict[str, Rows]:
        base: Any = CASES[kind][0]().double()
        base.config.use_cache = False
        if checkpointing:
            base.gradient_checkpointing_enable()
        model = fresh(base, importance)
        torch.manual_seed(3)
        with left_as_it_was(model, but_for_selection=True):
            model.calibrate(as_double(batches_of(kind)), progress=False)
        return selection_of(model)

    # dropout is active, so recomputing has to draw the same masks
    assert selected(True) == selected(False)


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_biases_that_two_targets_share_are_trained_once(importance: str):
    base = tiny_mlp(6, 6, 6)
    base.last.bias = base.first.bias
    model = fresh(base, importance)
    with left_as_it_was(model, but_for_selection=True):
        model.calibrate(taught(tiny_mlp(6, 6, 6), 6, 2, 0), loss=squared_error, progress=False)


def test_where_the_penalty_shuts_all_gates_the_order_of_the_changes_is_kept():
    # changes so small that each gains less than the penalty costs
    assert recall(two_layers, 0.01, 200, importance="l0", selection_learning_rate=1e-4) > 0.9
