from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import ViTForImageClassification

from peft_fps.reproduce import recipe_training
from peft_fps.reproduce.crops import CentreCrop, Direct, RandomCrop
from peft_fps.reproduce.epochs import BestEpoch
from peft_fps.reproduce.mixing import MixingCollator
from peft_fps.reproduce.recipe_training import (
    best_epoch,
    check_precision,
    fit,
    image_splits,
    kept_weights,
    trainer_arguments,
)
from peft_fps.reproduce.recipes import find_task
from peft_fps.reproduce.reproduce_options import ReproduceOptions
from peft_fps.reproduce.task_images import load_task
from peft_fps.vision.pixels import Collator
from tests.reproduce.layouts import write_vtab


NORMAL = {"mean": [0.5] * 3, "std": [0.5] * 3}
vtab_options = partial(ReproduceOptions, "vtab-1k", "dtd", "x")  # batches of 16
fgvc_options = partial(ReproduceOptions, "fgvc", "cub", "x")


@pytest.fixture
def data(tmp_path):
    return load_task(str(write_vtab(tmp_path / "x")), replace(find_task("vtab-1k", "dtd"), classes=2), seed=0)


def test_vtab_trains_on_the_images_as_they_are_evaluated(data):
    train, splits = image_splits(data, vtab_options(image_size=20), NORMAL)
    assert train is splits["train"]
    assert {split: len(part) for split, part in splits.items()} == {"train": 12, "validation": 6, "test": 8}
    assert splits["test"].processor.geometry == Direct(20)
    assert torch.equal(train[3]["pixel_values"], train[3]["pixel_values"])


def test_fgvc_trains_on_random_crops(data):
    train, splits = image_splits(replace(data, validation=None), fgvc_options(image_size=20), NORMAL)
    assert train.processor.geometry == RandomCrop(20)
    assert set(splits) == {"train", "test"}
    assert {split.processor.geometry for split in splits.values()} == {CentreCrop(20)}
    assert not torch.equal(train[3]["pixel_values"], train[3]["pixel_values"])
    assert train[3]["pixel_values"].shape == splits["test"][3]["pixel_values"].shape == (3, 20, 20)


def test_augmentation_can_be_turned_off(data):
    train, splits = image_splits(data, fgvc_options(augmentation=False), NORMAL)
    assert train is splits["train"]


@pytest.mark.parametrize(("images", "dropped"), [(1000, True), (16, True), (15, False)])
def test_an_incomplete_batch_is_left_out_unless_there_is_no_other(tmp_path, images, dropped):
    arguments = trainer_arguments(vtab_options(output=tmp_path), images, workers=0)
    assert arguments.dataloader_drop_last == dropped
    assert arguments.learning_rate == 2e-3
    assert arguments.num_train_epochs == 100
    assert arguments.get_warmup_steps(6200) == 620
    assert (arguments.adam_beta1, arguments.adam_beta2, arguments.adam_epsilon) == (0.9, 0.999, 1e-8)
    assert arguments.weight_decay == arguments.max_grad_norm == 0
    assert arguments.seed == 42


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_trainer_gets_precision_seed_and_folder(tmp_path, precision):
    options = vtab_options(precision=precision, seed=5, output=tmp_path)
    arguments = trainer_arguments(options, 100, workers=0)
    assert [arguments.bf16, arguments.fp16] == [precision == "bf16", False]
    assert arguments.seed == 5
    assert arguments.output_dir == str(tmp_path)


def test_float16_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--precision is fp16, which needs a CUDA GPU"):
        check_precision("fp16")
    check_precision("bf16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_precision("fp16")


def test_the_epoch_is_chosen_by_the_share_of_right_predictions(data, monkeypatch):
    class Predictor:
        def logits(self, model, split, title):
            return model

    _, splits = image_splits(data, vtab_options(), NORMAL)
    best = best_epoch(Predictor(), splits["validation"], decay=0.9)
    always_red = torch.tensor([[2.0, 1.0]]).repeat(6, 1)
    assert best.score(always_red) == 0.5
    assert best.decay == 0.9
    assert best_epoch(Predictor(), None, decay=0.9) is None


def test_which_weights_were_kept():
    assert kept_weights(None, epochs=7) == {"epoch": 7, "weights": "raw", "chosen_by": "the last epoch"}
    best = BestEpoch(lambda model: 0.0, decay=None)
    best.best, best.weights = {"epoch": 3, "raw": 0.1, "averaged": 0.2}, "averaged"
    assert kept_weights(best, epochs=7) == {"epoch": 3, "weights": "averaged", "chosen_by": "validation accuracy"}


def fitted(data, tmp_path, tiny_model, score, soft):
    options = vtab_options(image_size=32, batch_size=6, epochs=3, output=tmp_path)
    model = ViTForImageClassification.from_pretrained(tiny_model, dtype=torch.float32)
    train, _ = image_splits(data, options, NORMAL)
    collator = MixingCollator(Collator(False), classes=2) if soft else Collator(False)
    best = None if score is None else BestEpoch(score, decay=None)
    loss = fit(model, trainer_arguments(options, len(train), workers=0), train, collator, best, soft)
    return model, loss


@pytest.mark.parametrize("soft", [False, True])
def test_the_weights_of_the_best_epoch_stay(data, tmp_path, tiny_model, soft):
    seen = []

    def score(model):
        seen.append(model.classifier.weight.detach().clone())
        return [0.1, 0.9, 0.5][len(seen) - 1]

    model, loss = fitted(data, tmp_path, tiny_model, score, soft)
    assert len(seen) == 3
    assert torch.equal(model.classifier.weight, seen[1])
    assert not torch.equal(seen[1], seen[2])
    assert 0 < loss < 10


def test_a_loss_that_is_not_finite(data, tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr(
        recipe_training, "soft_cross_entropy", lambda *args, **kwargs: args[0]["logits"].sum() * torch.nan
    )
    with pytest.raises(ValueError, match="The training loss is nan: training diverged. Try a lower --learning-rate"):
        fitted(data, tmp_path, tiny_model, None, soft=True)
