"""Presets carry the numbers of their sources, which are written down here once more."""

import json
import re
import warnings
from dataclasses import fields
from typing import Any

import pytest
from peft import get_peft_model
from transformers import TrainingArguments

from peft_fps import FPSConfig, calibrate
from peft_fps.presets import PRESETS, preset_settings, recipe_line
from tests.support.helpers import image_batches, layers_of, selected_columns, tiny_vit
from tests.support.preset_table import preset_table


NAMES = [
    *("fps", "gps", "tr-pts", "tr-pts-parameters", "fish-mask"),
    *("far", "diff-pruning", "bitfit", "neuroada", "super-tuning"),
]

SELECTION: dict[str, dict[str, Any]] = {
    "fps": {"importance": "activation", "norm": "l1", "weight_magnitude": True, "per_neuron": 1, "bias": "all"},
    "gps": {"importance": "gradient", "loss": "contrastive", "granularity": "neuron", "per_neuron": 1, "bias": "all"},
    "tr-pts": {
        "importance": "fisher",
        "granularity": "block",
        "block_top": 0.03,
        "bias": "all",
        "token_keep_rate": 0.95,
    },
    "tr-pts-parameters": {"importance": "fisher", "granularity": "block", "token_keep_rate": None},
    "fish-mask": {"importance": "fisher", "fisher": "example", "granularity": "model", "budget": 0.005},
    "far": {"importance": "movement", "granularity": "row"},
    "diff-pruning": {"importance": "l0", "l0_penalty": 1.25e-7, "selection_learning_rate": 1e-5, "budget": 0.005},
    "bitfit": {"budget": 0, "bias": "with_norms"},
    "neuroada": {"importance": "magnitude", "granularity": "neuron", "per_neuron": 1, "bias": "none"},
    "super-tuning": {"importance": "magnitude", "order": "top", "granularity": "layer", "bias": "none"},
}

RECIPE: dict[str, dict[str, Any]] = {
    "fps": {"learning_rate": 2e-3, "num_train_epochs": 100, "lr_scheduler_type": "cosine", "warmup_steps": 0.1},
    "gps": {"learning_rate": 2e-3, "num_train_epochs": 100, "lr_scheduler_type": "cosine", "warmup_steps": 0.1},
    "tr-pts": {"learning_rate": 6e-4, "num_train_epochs": 100, "lr_scheduler_type": "cosine", "warmup_steps": 0.2},
    "tr-pts-parameters": {"learning_rate": 6e-4, "num_train_epochs": 100, "warmup_steps": 0.2},
    "fish-mask": {"per_device_train_batch_size": 16, "max_grad_norm": 1.0},
    "far": {},
    "diff-pruning": {"per_device_train_batch_size": 8, "max_grad_norm": 1.0},
    "bitfit": {"learning_rate": 1e-3, "num_train_epochs": 16, "lr_scheduler_type": "constant"},
    "neuroada": {"learning_rate": 8e-3, "per_device_train_batch_size": 8, "warmup_steps": 0.1},
    "super-tuning": {},
}


def test_the_presets_are_those_that_were_announced() -> None:
    assert list(PRESETS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_selects_as_its_source(name: str) -> None:
    config = FPSConfig.preset(name)
    assert {key: getattr(config, key) for key in SELECTION[name]} == SELECTION[name]


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_taken_by_training_arguments(name: str, tmp_path: Any) -> None:
    recipe = FPSConfig.preset(name).recipe
    assert recipe is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], **recipe)
    assert {key: getattr(arguments, key) for key in RECIPE[name]} == RECIPE[name]
    assert [arguments.optim, arguments.weight_decay] == ["adamw_torch", 0.0]  # no source decays


def test_gps_learning_rate_is_the_median_of_its_scripts() -> None:
    scripts = "2e-3 1e-2 3e-4 2e-3 2e-3 1.5e-3 7e-3 5e-4 2e-3 2e-3 2e-3 1e-3 4e-3 3e-3 1.5e-3 3e-3 3e-4 2.5e-3 5e-3"
    rates = sorted(map(float, scripts.split()))
    assert len(rates) == 19
    assert PRESETS["gps"].recipe["learning_rate"] == rates[9]


def test_tr_pts_gives_the_paper_s_share_on_vtab() -> None:
    neurons, parameters, head = 83_712, 85_798_656, 769 * 49.47  # of ViT-B/16, mean over the tasks
    k = PRESETS["tr-pts"].settings["per_neuron"]
    assert 100 * (neurons * (k + 1) + head) / parameters == pytest.approx(0.34, abs=0.005)


def test_super_tuning_takes_a_hundredth_of_every_matrix() -> None:
    model = get_peft_model(tiny_vit(), FPSConfig.preset("super-tuning"))
    for layer in layers_of(model).values():
        weight = layer.base_layer.weight.flatten(1)
        expected = int(weight.numel() * 0.01)
        best = sorted(range(weight.numel()), key=lambda i: -weight.flatten()[i].abs().item())[:expected]
        chosen = [
            row * weight.shape[1] + column for row, columns in enumerate(selected_columns(layer)) for column in columns
        ]
        assert chosen == sorted(best)


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_survives_saving(name: str, tmp_path: Any) -> None:
    config = FPSConfig.preset(name, seed=3)
    config.save_pretrained(str(tmp_path))
    json.loads((tmp_path / "adapter_config.json").read_text())
    loaded = FPSConfig.from_pretrained(str(tmp_path))
    assert loaded.to_dict() == config.to_dict()
    assert loaded.recipe == dict(PRESETS[name].recipe)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("given", "other"), [({"budget": 0.25}, "per_neuron"), ({"per_neuron": 4}, "budget")])
def test_a_number_of_entries_replaces_the_preset_s(name: str, given: dict[str, Any], other: str) -> None:
    config = FPSConfig.preset(name, **given)
    assert {key: getattr(config, key) for key in given} == given
    assert getattr(config, other) is None
    assert config.budget_pattern == {}


def test_an_own_budget_pattern_stands_beside_an_own_budget() -> None:
    config = FPSConfig.preset("super-tuning", budget=0.02, budget_pattern={"fc1": 0.1})
    assert [config.budget, config.budget_pattern] == [0.02, {"fc1": 0.1}]


@pytest.mark.parametrize("name", NAMES)
def test_overrides_replace_fields_and_leave_the_others(name: str) -> None:
    plain = FPSConfig.preset(name).to_dict()
    changed = FPSConfig.preset(name, seed=5, exclude_modules=["key"], recipe={"learning_rate": 1.0}).to_dict()
    assert changed == plain | {"seed": 5, "exclude_modules": ["key"], "recipe": {"learning_rate": 1.0}}


@pytest.mark.parametrize("importance", ["activation", "magnitude", "random", "gradient", "fisher", "movement", "l0"])
@pytest.mark.parametrize("name", NAMES)
def test_another_importance_starts_from_the_defaults(name: str, importance: str) -> None:
    config, plain = FPSConfig.preset(name, importance=importance), FPSConfig()
    assert config.importance == importance
    if importance != PRESETS[name].settings.get("importance"):
        for field in ("loss", "fisher", "norm", "selection_learning_rate", "selection_epochs", "l0_penalty"):
            assert getattr(config, field) == getattr(plain, field)
    assert config.recipe == dict(PRESETS[name].recipe)


def test_the_same_importance_keeps_its_settings() -> None:
    assert FPSConfig.preset("gps", importance="gradient").loss == "contrastive"


def test_an_unknown_name_lists_the_known_ones() -> None:
    known = ", ".join(map(repr, NAMES))
    with pytest.raises(ValueError, match=f"preset is 'lora', expected one of {re.escape(known)}"):
        FPSConfig.preset("lora")


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(TypeError, match="nonsense"):
        FPSConfig.preset("fps", nonsense=1)


@pytest.mark.parametrize("name", NAMES)
def test_changing_a_config_leaves_the_preset_alone(name: str) -> None:
    config, pristine = FPSConfig.preset(name), json.dumps(preset_settings(name, {}))
    assert config.recipe is not None
    config.recipe["learning_rate"] = 7.0
    config.budget_pattern["fc1"] = 0.5
    assert json.dumps(preset_settings(name, {})) == pristine


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_names_fields_of_the_config(name: str) -> None:
    assert set(PRESETS[name].settings) < {field.name for field in fields(FPSConfig)}


@pytest.mark.parametrize("name", [name for name in NAMES if name != "gps"])
def test_a_preset_calibrates_a_small_model(name: str) -> None:
    batches = [batch | {"labels": batch["pixel_values"].mean((1, 2, 3)).gt(0).long()} for batch in image_batches(2)]
    larger = {"budget": 0.25} if name == "far" else {}  # the biases of a tiny model exceed its budget
    model = get_peft_model(tiny_vit(), FPSConfig.preset(name, **larger))
    report = calibrate(model, batches, progress=False)
    assert report.trained > 0
    if report.budget:
        assert report.share <= report.budget


def table_rows() -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in preset_table().splitlines()]


def test_the_table_has_a_row_of_five_cells_for_every_preset() -> None:
    rows = table_rows()
    assert {len(row) for row in rows} == {5}
    assert [row[0] for row in rows[2:]] == [f"`{name}`" for name in NAMES]
    for row, name in zip(rows[2:], NAMES, strict=True):
        assert row[1] == PRESETS[name].source
        assert row[4] == PRESETS[name].deviations


def test_the_table_s_settings_build_the_preset() -> None:
    for (_, _, _, settings, _), name in zip(table_rows()[2:], NAMES, strict=True):
        match = re.match("`(.*?)`", settings)
        assert match is not None
        written = eval(f"dict({match[1]})")
        assert FPSConfig(**written).to_dict() | {"recipe": 0} == FPSConfig.preset(name).to_dict() | {"recipe": 0}


def test_the_table_says_what_selection_costs() -> None:
    costs = {row[0].strip("`"): row[2] for row in table_rows()[2:]}
    assert [name for name, cost in costs.items() if cost == "none"] == ["bitfit", "neuroada", "super-tuning"]
    assert [name for name, cost in costs.items() if cost == "forward"] == ["fps"]
    assert [name for name, cost in costs.items() if "backward" in cost] == [
        "gps",
        "tr-pts",
        "tr-pts-parameters",
        "fish-mask",
    ]
    assert costs["far"] == "short training, 1 epoch"
    assert costs["diff-pruning"] == "short training, 3 epochs"


def test_a_recipe_in_short() -> None:
    recipe = {"learning_rate": 2e-3, "warmup_steps": 0.1, "num_train_epochs": 3, "max_grad_norm": 0.0}
    assert recipe_line(recipe) == "learning rate 0.002, warm-up 10 %, 3 epochs, no clipping"
    assert recipe_line({"max_grad_norm": 1.0, "optim": "sgd"}) == "sgd, gradients clipped at 1"
    assert recipe_line({"num_train_epochs": 1}) == "1 epoch"
    assert recipe_line({}) == ""
