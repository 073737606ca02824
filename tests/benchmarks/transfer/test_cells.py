import json
from dataclasses import replace

import pytest
from hypothesis import given

from peft_fps.benchmarks.transfer.cells import Record, Setting
from tests.benchmarks.transfer.records import RECORDS, record


def test_the_folders_of_model_and_tasks_do_not_matter_but_the_model_does():
    first = Setting("/here/vit", "/here/tasks")
    assert first.comparable() == Setting("elsewhere/vit", "elsewhere").comparable()
    assert first.comparable() != Setting("/here/other", "/here/tasks").comparable()


@pytest.mark.parametrize(
    "change",
    [
        {"image_size": 16},
        {"epochs": 9},
        {"batch_size": 3},
        {"precision": "fp32"},
        {"attention": "eager"},
        {"threads": 2},
        {"tuned_share": 0.5},
    ],
    ids=lambda change: next(iter(change)),
)
def test_everything_else_does(change):
    setting = Setting("vit", "tasks")
    assert replace(setting, **change).comparable() != setting.comparable()


def test_a_setting_is_plain_data():
    found = Setting("vit", "tasks").comparable()
    assert json.loads(json.dumps(found)) == found


def test_the_row_of_a_cell():
    assert record("fps", "b", seed=2, share=0.1).cell.row == ("fps", 0.1)
    assert record("linear", share=None, rate=None).cell.row == ("linear", None)


@given(RECORDS)
def test_records_survive_json(given_record: Record):
    data = given_record.to_dict()
    assert Record.from_dict(json.loads(json.dumps(data))) == given_record
    assert not any(isinstance(value, dict) for key, value in data.items() if key not in ("seconds", "bytes"))


def test_from_dict_leaves_its_argument_alone():
    data = record("fps").to_dict()
    before = dict(data)
    Record.from_dict(data)
    assert data == before
