"""The record of how entries were chosen: what it keeps, leaves out, and refuses."""

import json
from dataclasses import fields
from typing import Any

import pytest

from peft_fps.selection.calibration_record import CalibrationRecord


FULL: dict[str, Any] = {
    "importance": "gradient",
    "order": "top",
    "granularity": "row",
    "seed": 3,
    "norm": "l1",
    "weight_magnitude": False,
    "fisher": "batch",
    "loss": "task",
    "selection_learning_rate": 0.5,
    "selection_epochs": 2,
    "l0_penalty": 0.0,
    "batches": 0,
    "examples": 7,
    "unreached": ["a", "b"],
    "combination": "ties",
    "adapters": ["one"],
    "weights": [1, 0.5],
    "density": 0.25,
    "majority_sign_method": "total",
}


def test_all_fields_are_written_and_read() -> None:
    assert FULL.keys() == {field.name for field in fields(CalibrationRecord)}
    found = CalibrationRecord.from_json(FULL)
    assert found.to_json() == FULL
    assert CalibrationRecord.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert (found.unreached, found.weights, found.batches, found.weight_magnitude) == (("a", "b"), (1, 0.5), 0, False)


def test_what_is_not_known_is_not_written() -> None:
    assert CalibrationRecord(seed=0).to_json() == {"seed": 0}
    assert CalibrationRecord().to_json() == {}
    assert CalibrationRecord.from_json({"norm": None, "unreached": [], "note": [1]}) == CalibrationRecord()


def test_a_record_that_says_nothing_is_told_from_others() -> None:
    assert not CalibrationRecord().known
    assert not CalibrationRecord.from_json({"importance": None}).known
    assert CalibrationRecord(seed=0).known
    assert CalibrationRecord(weight_magnitude=False).known


@pytest.mark.parametrize("name", FULL)
def test_a_field_of_another_type_is_refused(name: str) -> None:
    for wrong in ({"a": 1}, {"integer": 3}):
        with pytest.raises(ValueError, match=f"here: {name} is {{.*}}, expected "):
            CalibrationRecord.from_json({name: wrong}, "here")
    if name != "weight_magnitude":
        with pytest.raises(ValueError, match=f"{name} is True, expected "):
            CalibrationRecord(**{name: True})


@pytest.mark.parametrize("value", [None, [], "activation", 3])
def test_what_is_no_dict_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="expected a dict or none"):
        CalibrationRecord.from_json(value)
