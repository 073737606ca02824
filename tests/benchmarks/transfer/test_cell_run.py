"""Real cells of every kind, on tiny tasks."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from transformers import ViTForImageClassification

from peft_fps import FPSConfig, Selection
from peft_fps.benchmarks.transfer import cell_run
from peft_fps.benchmarks.transfer.arms import ARMS, Arm
from peft_fps.benchmarks.transfer.cell_run import run_cell, select
from peft_fps.benchmarks.transfer.cells import Cell
from peft_fps.benchmarks.transfer.method_configs import selecting
from peft_fps.benchmarks.transfer.tasks import load_task
from peft_fps.vision.classifiers import interpolates, load_model
from peft_fps.vision.pixels import Collator
from peft_fps.vision.training_loop import DivergedError
from tests.benchmarks.transfer.conftest import COUNTS, TASKS, picture
from tests.benchmarks.transfer.records import SHARE, results
from tests.support.helpers import bits


WIDTH, HIDDEN, LAYERS, PATCH = 32, 48, 2, 3 * 4 * 4
MODULES = 1 + 6 * LAYERS
BACKBONE = (
    (PATCH + 1) * WIDTH  # patches
    + (1 + 16 + 1) * WIDTH  # class token and positions
    + LAYERS * (4 * (WIDTH + 1) * WIDTH + (WIDTH + 1) * HIDDEN + (HIDDEN + 1) * WIDTH + 4 * WIDTH)
    + 2 * WIDTH
)
KINDS = {
    "linear": None,
    "full": 3e-4,
    "bitfit": 3e-3,
    "lora": 3e-3,
    "supertuning": 1e-2,
    "random": 1e-2,
    "fps": 1e-2,
    "fps-biases-lora": 1e-2,
    "gps": 1e-2,
    "gps-task": 1e-2,
    "fps-8-images": 1e-2,
    "fps-augmented": 1e-2,
    "fps-default": 1e-2,
    "try-low-rates": 1e-2,
}
"""Learning rates by method."""


def cell(method: str, rate: float | None = 1e-2, task: str = "bright", seed: int = 0) -> Cell:
    return Cell(task, method, SHARE if ARMS[method].budgeted else None, seed, rate)


def images_of(task: str, split: str) -> tuple[torch.Tensor, np.ndarray]:
    """Pixel values as the model takes them, made anew, and labels."""
    start = 100 * list(COUNTS).index(split)
    labels = [label for label in range(TASKS[task][1]) for _ in range(COUNTS[split])]
    levels = np.stack([picture(task, label, start + i % COUNTS[split]) for i, label in enumerate(labels)])
    pixels = torch.from_numpy(levels.astype(np.float32)).permute(0, 3, 1, 2) / 255 * 2 - 1
    return pixels, np.array(labels)


@torch.no_grad()
def naive_accuracy(model, task: str, split: str) -> float:
    pixels, labels = images_of(task, split)
    found = model.eval()(pixel_values=pixels).logits.argmax(-1).numpy()
    return float((found == labels).mean())


@pytest.fixture(scope="module")
def ran(setting):
    """Record and trained model of every kind."""
    models = {"linear": None}
    method, original = "", cell_run.train

    def train(model, *rest, **options):
        models[method] = model
        return original(model, *rest, **options)

    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cell_run, "train", train)
        for method, rate in KINDS.items():
            record = run_cell(cell(method, rate), setting)
            found[method] = record, models[method]
    return found


@pytest.mark.parametrize("method", KINDS)
def test_a_cell_says_what_came_out_of_it(method, ran, setting):
    record, model = ran[method]
    assert record.cell == cell(method, KINDS[method])
    assert record.group == "natural"
    assert (record.head, record.backbone) == (3 * WIDTH + 3, BACKBONE)
    assert 0 <= record.validation <= 1
    assert 0 <= record.test <= 1
    assert set(record.seconds) == {"select", "train"}
    assert record.seconds["train"] > 0
    assert set(record.bytes) == {"select", "train", "adapter"}
    if method != "linear":
        assert 0 < record.loss < 10
        assert record.validation == naive_accuracy(model, "bright", "validation")
        assert record.test == naive_accuracy(model, "bright", "test")
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert record.trained == trained - record.head


@pytest.mark.parametrize("method", KINDS)
def test_the_same_cell_gives_the_same_record(method, ran, setting):
    again, before = run_cell(cell(method, KINDS[method]), setting), ran[method][0]
    assert results(again) == results(before)
    for stage in ("select", "train"):
        assert again.bytes[stage] == pytest.approx(before.bytes[stage], rel=0.2)


@pytest.mark.parametrize("method", KINDS)
def test_as_much_is_trained_as_the_method_may(method, ran):
    trained = ran[method][0].trained
    if method == "linear":
        assert trained == 0
    elif method == "full":
        assert trained == BACKBONE
    elif method == "bitfit":
        assert trained == WIDTH + LAYERS * (4 * WIDTH + HIDDEN) + (2 * LAYERS + 1) * WIDTH
    elif method == "lora":
        assert trained == LAYERS * (4 * 2 * WIDTH + 2 * (WIDTH + HIDDEN))
        assert trained <= SHARE * BACKBONE
    else:
        assert SHARE * BACKBONE - MODULES <= trained <= SHARE * BACKBONE


def test_only_methods_that_see_data_hold_bytes_for_their_selection(ran):
    held = {method: record.bytes["select"] for method, (record, _) in ran.items()}
    seeing = {name for name in KINDS if name.startswith(("fps", "gps", "try"))}
    assert {method for method, found in held.items() if found} == seeing
    assert held["gps"] > held["fps"]


def test_bytes_of_a_step_and_of_the_file(ran):
    held = {method: record.bytes for method, (record, _) in ran.items()}
    weights = 4 * (BACKBONE + 3 * WIDTH + 3)
    # gradients and AdamW's two moments of everything live at the end of a step
    assert held["full"]["train"] > 3 * weights
    assert weights < held["full"]["adapter"] < weights + 20_000
    assert 4 * (ran["fps"][0].trained + 3 * WIDTH + 3) < held["fps"]["adapter"] < weights / 4
    features = sum(3 * count for count in COUNTS.values()) * WIDTH * 4
    assert held["linear"] == {"select": 0, "train": features, "adapter": 0}


@pytest.mark.parametrize("method", ["full", "lora", "supertuning", "fps", "gps"])
def test_a_file_of_trained_values_has_the_size_that_was_measured_before(method, ran):
    record, model = ran[method]
    assert cell_run._file_bytes(model) == record.bytes["adapter"]


def test_methods_and_seeds_train_differently(ran, setting):
    losses = {method: record.loss for method, (record, _) in ran.items()}
    assert len(set(losses.values())) == len(losses)
    assert run_cell(cell("fps", seed=1), setting).loss != losses["fps"]


def test_the_linear_head_is_the_best_logistic_regression_on_frozen_features(ran, setting):
    vit = ViTForImageClassification.from_pretrained(setting.model).vit.eval()
    features = {}
    for split in COUNTS:
        pixels, labels = images_of("bright", split)
        with torch.no_grad():
            features[split] = vit(pixel_values=pixels).last_hidden_state[:, 0].double().numpy(), labels
    scaler = StandardScaler().fit(features["train"][0])
    reached = {}
    for strength in (0.001, 0.01, 0.1, 1.0, 10.0, 100.0):
        fitted = LogisticRegression(C=strength, max_iter=5000)
        fitted.fit(scaler.transform(features["train"][0]), features["train"][1])
        for split in ("validation", "test"):
            x, y = features[split]
            reached[strength, split] = float((fitted.predict(scaler.transform(x)) == y).mean())
    best = max((reached[strength, "validation"], -strength) for strength, _ in reached)
    record = ran["linear"][0]
    assert record.validation == best[0]
    assert record.test == reached[-best[1], "test"]
    assert record.loss is None


@pytest.mark.parametrize("method", ["full", "fps", "lora"])
def test_a_rate_that_diverges_is_a_bad_result_and_no_error(method, setting):
    record = run_cell(cell(method, 1e6), replace(setting, epochs=3))
    assert record.loss is None or math.isfinite(record.loss)
    assert 0 <= record.validation <= 1
    assert 0 <= record.test <= 1


def test_a_loss_that_is_not_finite_is_none(setting, monkeypatch, caplog):
    def diverge(model, *rest, **options):
        for parameter in model.parameters():
            parameter.data.fill_(math.nan)
        raise DivergedError("The training loss is nan")

    monkeypatch.setattr(cell_run, "train", diverge)
    record = run_cell(cell("fps"), setting)
    assert record.loss is None
    assert record.test == pytest.approx(1 / 3)  # of equal classes, all are named as the first one
    assert "diverged" in caplog.text


def test_autocast_is_another_training(ran, setting):
    record = run_cell(cell("fps"), replace(setting, precision="bf16"))
    assert math.isfinite(record.loss)
    assert record.loss != ran["fps"][0].loss
    assert record.trained == ran["fps"][0].trained


def prepared(method: str, setting, task: str = "bright"):
    loaded = load_task(task, setting)
    base = load_model(setting.model, loaded.classes, 0)
    build = ARMS[method].build
    model = get_peft_model(base, build(base, SHARE, 0)) if build else base
    return model, loaded, Collator(interpolates(base))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["full", "lora", "random"])
def test_measuring_a_step_changes_nothing(method, precision, setting):
    model, task, collator = prepared(method, setting)
    before = {name: bits(value) for name, value in model.state_dict().items()}
    # more images than a batch could have: all that there are
    held = cell_run._training_bytes(model, replace(setting, batch_size=1000, precision=precision), task, collator)
    assert held > 0
    assert {name: bits(value) for name, value in model.state_dict().items()} == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_whole_cell_with_batches_larger_than_the_task(setting):
    record = run_cell(cell("fps", task="stripes"), replace(setting, batch_size=1000))
    assert record.group == "structured"
    assert record.head == 2 * WIDTH + 2


@pytest.mark.parametrize("batch_size", [3, 4, 8, 16])
def test_a_selection_sees_exactly_its_images(batch_size, setting, monkeypatch):
    monkeypatch.setitem(ARMS, "six", Arm("six images", selecting(), tuned_as="fps", images=6))
    here = replace(setting, batch_size=batch_size)
    model, task, collator = prepared("six", setting)
    select(model, cell("six"), here, task, collator)
    assert Selection.of(model).method["calibration"]["examples"] == 6
    select(model, cell("fps"), here, task, collator)
    assert Selection.of(model).method["calibration"]["examples"] == 15
    select(model, cell("fps"), here, task, collator, batches=1)
    assert Selection.of(model).method["calibration"]["examples"] == min(batch_size, 15)


def test_a_selection_from_more_images_than_there_are_is_refused(setting):
    model, task, collator = prepared("fps", setting)
    before = Selection.of(model)
    message = "fps-32-images selects from 32 images, expected at most the 15 training images of the task 'bright'"
    with pytest.raises(ValueError, match=message):
        select(model, cell("fps-32-images"), setting, task, collator)
    assert Selection.of(model) == before
    with pytest.raises(ValueError, match=message):
        run_cell(cell("fps-32-images"), setting)


def test_augmented_images_come_in_pairs(setting):
    model, task, collator = prepared("fps-augmented", setting)
    select(model, cell("fps-augmented"), setting, task, collator)
    augmented = Selection.of(model)
    assert augmented.method["calibration"]["examples"] == 2 * 15
    select(model, cell("fps"), setting, task, collator)
    assert 0.3 < augmented.overlap(Selection.of(model)).total < 1


def test_a_budget_that_a_method_cannot_keep_is_refused(setting):
    with pytest.raises(ValueError, match="A rank of 1"):
        run_cell(replace(cell("lora"), share=0.001), setting)


def test_size_of_a_file(setting, tmp_path):
    model, _, _ = prepared("fps", setting)
    assert isinstance(model.peft_config["default"], FPSConfig)
    tensors = {"x": torch.zeros(1000)}
    save_file(tensors, tmp_path / "x.safetensors")
    model.save_pretrained(tmp_path / "adapter")
    assert cell_run._file_bytes(model) == (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size


def test_other_errors_of_training_are_no_divergence(setting, monkeypatch):
    def refuse(*arguments, **options):
        raise ValueError("images of two sizes")

    monkeypatch.setattr(cell_run, "train", refuse)
    with pytest.raises(ValueError, match="images of two sizes"):
        run_cell(cell("random"), setting)
