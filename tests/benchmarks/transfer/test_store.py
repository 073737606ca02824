import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_fps.benchmarks.transfer.cells import Record, Setting
from peft_fps.benchmarks.transfer.store import Store, read
from tests.benchmarks.transfer.records import RECORDS, record


SETTING = Setting("vit", "tasks")
FIRST, SECOND, THIRD = record("fps"), record("gps", "b"), record("linear", "c", share=None, rate=None)


@given(st.lists(RECORDS, max_size=4))
def test_cells_are_kept_as_they_are_added(tmp_path_factory, records: list[Record]):
    path = tmp_path_factory.mktemp("store") / "new" / "cells.jsonl"
    store = Store(path, SETTING, {"processor": "Abacus"})
    for added in records:
        store.add(added)
        assert len(path.read_text(encoding="utf-8").splitlines()) == 1 + len(store.records)
    again = Store(path, SETTING, {"processor": "another"})
    assert again.records == store.records == records
    assert read(path)[0] == {"setting": SETTING.comparable(), "processor": "Abacus"}


@pytest.mark.parametrize("lost", [1, 2, 30, 1000])
def test_a_line_cut_short_is_left_out_and_others_follow_it(tmp_path, lost):
    path = tmp_path / "cells.jsonl"
    store = Store(path, SETTING, {})
    store.add(FIRST)
    whole = path.read_bytes()
    store.add(SECOND)
    line = path.read_bytes()[len(whole) :]
    path.write_bytes(whole + line[: max(len(line) - lost, 1)])

    assert read(path)[1] == [FIRST]
    again = Store(path, SETTING, {})
    assert again.records == [FIRST]
    assert path.read_bytes() == whole
    again.add(THIRD)
    assert Store(path, SETTING, {}).records == [FIRST, THIRD]


def test_a_whole_file_is_not_touched(tmp_path):
    path = tmp_path / "cells.jsonl"
    Store(path, SETTING, {}).add(FIRST)
    before = path.read_bytes()
    Store(path, SETTING, {})
    assert path.read_bytes() == before


def test_rates_of_another_run_stay_with_the_cells(tmp_path):
    path, rates = tmp_path / "cells.jsonl", {("fps", "a"): 0.01, ("linear", "a"): None}
    Store(path, SETTING, {}, rates).add(FIRST)
    before = path.read_bytes()
    assert Store(path, SETTING, {}).rates == Store(path, SETTING, {}, rates).rates == rates
    with pytest.raises(ValueError, match="at other learning rates than --rates-of"):
        Store(path, SETTING, {}, rates | {("fps", "a"): 0.03})
    assert path.read_bytes() == before


def test_another_setting_is_refused_with_both_named(tmp_path):
    path = tmp_path / "cells.jsonl"
    Store(path, SETTING, {}).add(FIRST)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="holds cells of the setting") as caught:
        Store(path, replace(SETTING, epochs=77), {})
    found, expected = str(caught.value).split(", expected ")
    assert str(path) in found
    assert "'epochs': 5" in found
    assert "'epochs': 77" in expected
    assert "--output" in expected
    assert path.read_bytes() == before


def test_cells_from_before_attention_could_be_chosen_are_of_the_default(tmp_path):
    path = tmp_path / "cells.jsonl"
    setting = {key: value for key, value in SETTING.comparable().items() if key != "attention"}
    path.write_text(json.dumps({"setting": setting}) + "\n", encoding="utf-8")
    assert Store(path, SETTING, {}).records == []
    with pytest.raises(ValueError, match="'attention': 'sdpa'"):
        Store(path, replace(SETTING, attention="eager"), {})


HEADER = json.dumps({"setting": SETTING.comparable()}) + "\n"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        "lunch\n",
        "3\n",
        "[]\n",
        '"setting"\n',
        '{"other": 1}\n',
        HEADER[:-1],  # not even the first line is whole
        HEADER + "{}\n",
        HEADER + "3\n",
        HEADER + "null\n",
        HEADER + '{"task": "a"}\n',
        HEADER + json.dumps(FIRST.to_dict() | {"extra": 1}) + "\n",
        HEADER + "half a\n" + json.dumps(FIRST.to_dict()) + "\n",
    ],
)
def test_garbage_is_refused(tmp_path, text):
    path = tmp_path / "cells.jsonl"
    path.write_text(text, encoding="utf-8")
    for attempt in (lambda: read(path), lambda: Store(path, SETTING, {})):
        with pytest.raises(ValueError, match="holds no cells of a transfer benchmark") as caught:
            attempt()
        assert str(path) in str(caught.value)
    assert path.read_text(encoding="utf-8") == text


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "cells.jsonl"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="holds no cells of a transfer benchmark"):
        Store(path, SETTING, {})
