"""What a report says about how entries were chosen: after calibrating, loading, and applying a selection."""

from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel, get_peft_model
from torch import nn

from peft_fps import FPSConfig, Selection
from peft_fps.card.selection_method import describe, method_record
from peft_fps.layers.adapter_state import AdapterState
from peft_fps.selection.calibration_record import CalibrationRecord
from tests.support.helpers import adapted, normal, tiny_mlp


def fresh(**options: Any) -> PeftModel:
    """A model with an untrained adapter, by activation unless told otherwise."""
    return adapted(tiny_mlp(), filled=False, **{"importance": "activation", **options})


def calibrated(examples: int = 5, **options: Any) -> PeftModel:
    model = fresh(**options)
    model.calibrate([normal(examples, 10)], progress=False)
    return model


def method(model: nn.Module) -> str:
    """As the report has it, which must not depend on who says it."""
    found = model.selection_report()
    assert f"selected by {found.method}\n" in str(found)
    return found.method


# --- from a record --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("needed", [True, False])
@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"importance": "magnitude"}, "weight magnitude"),
        ({"importance": "magnitude", "examples": 4}, "weight magnitude"),
        ({"importance": "random", "seed": 4}, "chance (seed 4)"),
        ({"importance": "random"}, "chance"),
        ({"importance": "activation", "norm": "l1", "weight_magnitude": True}, "weight magnitude x mean |input|"),
        ({"importance": "activation", "norm": "l2", "weight_magnitude": False}, "root mean square of the input"),
        ({"importance": "activation"}, "weight magnitude x mean |input|"),
        ({"importance": "gradient", "loss": "task", "examples": 1200}, "|sum of gradients| over 1,200 examples"),
        ({"importance": "gradient", "loss": "contrastive"}, "|sum of gradients|, contrastive loss"),
        ({"importance": "sensitivity"}, "|weight x sum of gradients|"),
        ({"importance": "fisher", "fisher": "batch"}, "squared gradients of each batch"),
        ({"importance": "fisher", "fisher": "example"}, "squared gradients of each example"),
        ({"importance": "movement", "examples": 1}, "movement in a short fine-tuning over 1 examples"),
        ({"importance": "l0"}, "change under hard-concrete gates"),
        ({"importance": "magnitude", "order": "bottom"}, "bottom of weight magnitude"),
        ({"importance": "magnitude", "order": "top", "granularity": "row"}, "weight magnitude, granularity row"),
        ({"importance": "by hand", "examples": 3}, "by hand over 3 examples"),
        ({"importance": None, "granularity": "layer"}, "an unknown method, granularity layer"),
        ({}, "an unknown method"),
    ],
)
def test_a_record_says_how_whatever_the_config_asks_for(record: dict[str, Any], text: str, needed: bool):
    config = FPSConfig(
        importance="activation" if needed else "random", norm="l2", order="bottom", granularity="model", seed=9
    )
    known = CalibrationRecord.from_json(record)
    state = AdapterState(selected=True, calibration=known)
    assert describe(config, state) == text
    assert method_record(config, state) == (known if record else None)


# --- without a record -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "weight magnitude until calibrated, granularity neuron"),
        (
            {"order": "bottom", "granularity": "layer"},
            "bottom of weight magnitude until calibrated, granularity layer",
        ),
        ({"importance": "magnitude"}, "weight magnitude, granularity neuron"),
        ({"importance": "random", "seed": 4}, "chance (seed 4), granularity neuron"),
        ({"init_weights": False}, "chance"),
        ({"importance": "magnitude", "init_weights": False}, "chance"),
        ({"budget": 0}, "weight magnitude, granularity neuron"),  # nothing was ranked by data
    ],
)
def test_a_new_adapter(options: dict[str, Any], text: str):
    assert method(fresh(**options)) == text


def test_an_adapter_loaded_with_its_record(tmp_path: Path):
    calibrated(norm="l2").save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_mlp(), tmp_path)
    assert method(loaded) == "weight magnitude x root mean square of the input over 5 examples, granularity neuron"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "an unknown method"),  # saved uncalibrated, or written by another program
        ({"importance": "magnitude"}, "weight magnitude, granularity neuron"),
        ({"init_weights": False}, "chance"),
    ],
)
def test_an_adapter_loaded_without_a_record(options: dict[str, Any], text: str, tmp_path: Path):
    fresh(**options).save_pretrained(tmp_path)
    assert method(PeftModel.from_pretrained(tiny_mlp(), tmp_path)) == text


# --- after a selection was applied ----------------------------------------------------------------------------------


TARGETS: list[dict[str, Any]] = [
    {"importance": "magnitude"},
    {"importance": "random", "seed": 3},
    {"importance": "magnitude", "order": "bottom", "granularity": "model"},
    {"importance": "activation", "norm": "l2"},
    {"importance": "gradient", "loss": "contrastive"},
    {"init_weights": False},
]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("source", "text"),
    [
        ({"granularity": "layer"}, "weight magnitude x mean |input| over 5 examples, granularity layer"),
        ({"weight_magnitude": False, "order": "bottom"}, "bottom of mean |input| over 5 examples, granularity neuron"),
        ({"importance": "magnitude"}, "weight magnitude, granularity neuron"),
        ({"importance": "random", "seed": 8}, "chance (seed 8), granularity neuron"),
    ],
)
def test_the_report_tells_the_selection_s_method(source: dict[str, Any], text: str, target: dict[str, Any]):
    selection, model = Selection.of(calibrated(**source)), fresh(**target)
    assert selection.apply(model, discard_values=True).method == text
    assert method(model) == text
    assert Selection.of(model).method == selection.method


@pytest.mark.parametrize("target", TARGETS)
def test_an_uncalibrated_selection_was_by_magnitude(target: dict[str, Any]):
    model = fresh(**target)
    Selection.of(fresh()).apply(model, discard_values=True)
    assert method(model) == "weight magnitude, granularity neuron"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("told", "text"),
    [
        ({}, "an unknown method"),
        ({"importance": None, "order": None, "granularity": None, "calibration": None}, "an unknown method"),
        ({"importance": "by hand", "order": "bottom"}, "bottom of by hand"),
        ({"importance": "magnitude", "granularity": "model"}, "weight magnitude, granularity model"),
    ],
)
def test_a_selection_without_a_record(told: dict[str, Any], text: str, target: dict[str, Any], tmp_path: Path):
    model = fresh(**target)
    Selection(Selection.of(fresh()).modules, told).apply(model, discard_values=True)
    assert method(model) == text
    chosen = {key: Selection.of(model).method[key] for key in ("importance", "order", "granularity")}
    assert chosen == {"importance": None, "order": None, "granularity": None} | {
        key: value for key, value in told.items() if key in chosen
    }
    model.save_pretrained(tmp_path)
    assert method(PeftModel.from_pretrained(tiny_mlp(), tmp_path)) == text
    assert Selection.from_adapter(tmp_path).method == Selection.of(model).method


def test_a_selection_of_unknown_origin_stays_so(tmp_path: Path):
    fresh().save_pretrained(tmp_path)
    selection, model = Selection.from_adapter(tmp_path), fresh(importance="magnitude")
    selection.apply(model)
    assert Selection.of(model) == selection


def test_calibrating_afterwards_is_told():
    model = fresh(norm="l2")
    Selection.of(fresh(importance="random")).apply(model)
    model.calibrate([normal(7, 10)], progress=False)
    assert method(model) == "weight magnitude x root mean square of the input over 7 examples, granularity neuron"


def test_an_applied_selection_replaces_the_record_of_a_file(tmp_path: Path):
    calibrated().save_pretrained(tmp_path)
    model = get_peft_model(tiny_mlp(), FPSConfig.from_pretrained(str(tmp_path)))
    Selection.of(fresh(importance="magnitude")).apply(model)
    assert method(model) == "weight magnitude, granularity neuron"
