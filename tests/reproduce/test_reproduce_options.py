from pathlib import Path

import pytest

from peft_fps.presets import PRESETS
from peft_fps.reproduce.deviations import deviations
from peft_fps.reproduce.recipes import find_task
from peft_fps.reproduce.reproduce_options import METHODS, ReproduceOptions


def options(benchmark="fgvc", task="nabirds", **given):
    return ReproduceOptions(benchmark, task, "data", **given)


def test_the_published_settings_hold_unless_given():
    used = options(epochs=3, batch_size=8, ema=0.5).settings()
    assert used == {
        **{"model": "timm/vit_base_patch16_224.augreg_in21k", "image_size": 224, "warm_up": 0.1, "seed": 42},
        **{"per_neuron": 20, "learning_rate": 1e-4, "drop_path": 0.1, "augmentation": True},
        **{"epochs": 3, "batch_size": 8, "ema": 0.5, "precision": "fp32"},
    }


def test_training_arguments_of_the_recipe():
    assert options().training() == {
        **{"optim": "adamw_torch", "weight_decay": 0.0, "max_grad_norm": 0.0},
        **{"learning_rate": 1e-4, "num_train_epochs": 100, "per_device_train_batch_size": 32},
        **{"lr_scheduler_type": "cosine", "warmup_steps": 0.1},
    }


def test_on_a_gpu_in_float16_nothing_differs():
    assert options(precision="fp16").differences(classes=(555, 555), training_images=(None, None)) == {}


def test_what_differs_is_listed():
    found = options(learning_rate=1e-4, epochs=5, drop_path=0.0, augmentation=False, limit=9).differences(
        classes=(555, 10)
    )
    assert found == {
        "precision": {"recipe": "fp16", "here": "fp32"},
        "epochs": {"recipe": 100, "here": 5},
        "drop_path": {"recipe": 0.1, "here": 0.0},
        "augmentation": {"recipe": True, "here": False},
        "limit": {"recipe": None, "here": 9},
        "classes": {"recipe": 555, "here": 10},
    }


@pytest.mark.parametrize("given", [{"train_on_all": True}, {"ema": 0.0}])
def test_without_an_average(given):
    run = options(precision="fp16", **given)
    assert run.settings()["ema"] is None
    assert run.differences() == {"ema": {"recipe": 0.9998, "here": None}}


@pytest.mark.parametrize(
    ("method", "per_neuron", "budget"),
    [("fps", 20, None), ("gps", 20, None), ("neuroada", 20, None), ("fish-mask", None, 0.005), ("bitfit", None, 0.0)],
)
def test_the_tasks_k_goes_to_methods_that_have_one(method, per_neuron, budget):
    run = options(method=method)
    config = run.config()
    assert (config.per_neuron, config.budget) == (per_neuron, budget)
    assert config.importance == PRESETS[method].settings.get("importance", "activation")
    assert config.recipe == run.training()
    assert config.seed == 42
    assert ("method" in run.differences()) == (method not in ("fps", "gps"))


def test_a_given_k_goes_to_every_method():
    for method in METHODS:
        assert options(method=method, per_neuron=3).config().per_neuron == 3


def test_an_unknown_task():
    with pytest.raises(ValueError, match="'dtd' is no task of FGVC"):
        options(task="dtd").config()


def test_options_as_plain_data():
    assert options(output=Path("o")).to_dict()["output"] == "o"
    assert options().to_dict()["output"] == str(Path("runs/reproduce/nabirds-fps"))


def test_deviations_name_what_matters():
    vtab, fgvc = find_task("vtab-1k", "dtd"), find_task("fgvc", "cub")
    for task in (vtab, fgvc):
        text = " ".join(deviations(task, "fps"))
        assert "pick the epoch on the test set" in text
        assert "110 epochs" in text
    assert "EMA" not in " ".join(deviations(vtab, "fps"))
    assert "EMA" in " ".join(deviations(fgvc, "fps"))
    assert "GPS selects under float16" in " ".join(deviations(vtab, "gps"))
    assert "not that of the method's own paper" in " ".join(deviations(vtab, "bitfit"))
