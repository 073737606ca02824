"""What saving records about an adapter: its form in files, and what is refused."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from peft_fps.checkpoint.record import AdapterRecord, allocation_from_json, read_record, record_from
from peft_fps.selection.calibration_record import CalibrationRecord
from peft_fps.selection.module_sizes import ModuleSizes


VERSION_1 = Path(__file__).parent / "version_1"
PLAIN: dict[str, Any] = {
    "allocation": {
        "blocks.0.query": {"neurons": 2, "inputs": 3, "entries": 4},
        "blocks.0.norm": {"neurons": 3, "inputs": 0, "entries": 0},
    },
    "calibration": {"importance": "activation", "norm": "l2", "weight_magnitude": False, "unreached": ["pooler"]},
    "base_fingerprint": {"sha256": "0" * 64, "dtype": "float32", "sample": ""},
    "whole_tensors": ["classifier.bias", "classifier.weight"],
    "tensors_sha256": "1" * 64,
    "pickled": True,
}
RECORD = AdapterRecord(
    allocation={"blocks.0.query": ModuleSizes(2, 3, 4), "blocks.0.norm": ModuleSizes(3, 0, 0)},
    calibration=CalibrationRecord(importance="activation", norm="l2", weight_magnitude=False, unreached=("pooler",)),
    base_fingerprint={"sha256": "0" * 64, "dtype": "float32", "sample": ""},
    whole_tensors=("classifier.bias", "classifier.weight"),
    tensors_sha256="1" * 64,
    pickled=True,
)
LITTLE = AdapterRecord({})


def test_a_record_is_written_and_read_as_plain_data() -> None:
    assert RECORD.to_json() == PLAIN
    assert AdapterRecord.from_json(json.loads(json.dumps(PLAIN))) == RECORD
    assert LITTLE.to_json() == {**dict.fromkeys(PLAIN), "allocation": {}, "pickled": False}
    assert AdapterRecord.from_json(LITTLE.to_json()) == AdapterRecord.from_json({"allocation": {}}) == LITTLE


def test_a_record_does_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RECORD.pickled = False  # type: ignore[misc]


def test_modules_may_get_other_names_in_the_same_order() -> None:
    renamed = RECORD.renamed(["blocks.0.q", "blocks.0.ln"])
    assert list(renamed.allocation.items()) == [
        ("blocks.0.q", ModuleSizes(2, 3, 4)),
        ("blocks.0.ln", ModuleSizes(3, 0, 0)),
    ]
    assert dataclasses.replace(renamed, allocation=RECORD.allocation) == RECORD
    with pytest.raises(ValueError, match="longer"):
        RECORD.renamed(["blocks.0.q"])


def test_either_version_gives_a_record_or_none() -> None:
    nothing = dict.fromkeys(PLAIN)
    assert record_from(None, nothing) is None
    assert record_from(None, nothing | {"pickled": False}) is None
    assert record_from(PLAIN, nothing) == record_from(RECORD, nothing) == record_from(None, PLAIN) == RECORD
    with pytest.raises(ValueError, match="record was given beside allocation"):
        record_from(PLAIN, PLAIN)
    with pytest.raises(
        ValueError, match=r"record was given beside tensors_sha256, .* fetch or save the adapter again"
    ):
        record_from(RECORD, nothing | {"tensors_sha256": "1" * 64})


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ((2, 3, 7), "at most neurons times inputs"),
        ((2, 3, -1), "integers of at least 0"),
        ((True, 3, 1), "integers of at least 0"),
        ((2.0, 3, 1), "integers of at least 0"),
        (("2", 3, 1), "integers of at least 0"),
    ],
)
def test_wrong_sizes_are_refused_with_their_module(sizes: tuple[Any, ...], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ModuleSizes(*sizes)
    plain = {"blocks.0.query": dict(zip(("neurons", "inputs", "entries"), sizes, strict=True))}
    with pytest.raises(ValueError, match=rf"allocation\['blocks.0.query'\] is .*{says}"):
        allocation_from_json(plain)


def test_the_record_of_a_folder_is_that_of_its_config(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "FPS", "record": PLAIN}))
    assert read_record(tmp_path) == RECORD
    shutil.copyfile(VERSION_1 / "other" / "adapter_config.json", tmp_path / "adapter_config.json")
    old = read_record(tmp_path)
    assert old is not None
    assert old.to_json() == {
        name: value
        for name, value in json.loads((tmp_path / "adapter_config.json").read_text()).items()
        if name in PLAIN
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "FPS"}))
    assert read_record(tmp_path) is None
    with pytest.raises(FileNotFoundError):
        read_record(tmp_path / "nowhere")
