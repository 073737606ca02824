"""FPS as a member of PEFT's enum and tables, in this process and in fresh ones."""

import copy
import importlib
import json
import pickle
from enum import unique
from pathlib import Path
from typing import Any

import pytest
from peft import PeftConfig, PeftType
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners import mixed
from peft.tuners.tuners_utils import BaseTuner

import peft_fps
from peft_fps import FPSConfig, FPSMixedModel, FPSModel, registration
from tests.support.helpers import finish, start_python


FPS = PeftType("FPS")
PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


# --- the member -----------------------------------------------------------------------------------------------------


def test_lookups_give_one_object():
    assert PeftType("FPS") is PeftType["FPS"] is PeftType.FPS is PeftType.__members__["FPS"]
    assert [member for member in PeftType if member == "FPS"] == [FPS]
    assert next(reversed(list(PeftType))) is FPS
    assert FPS in PeftType
    assert FPS in list(PeftType)
    assert "FPS" in list(PeftType)
    assert len(PeftType) == len(list(PeftType)) == len(PeftType.__members__)
    assert unique(PeftType) is PeftType
    assert "FPS" in dir(PeftType)


def test_the_member_is_like_the_native_ones():
    native = PeftType.LORA
    assert (type(FPS), FPS.name, FPS.value) == (PeftType, "FPS", "FPS")
    assert isinstance(FPS, str)
    assert FPS == "FPS"
    assert native != FPS
    assert hash(FPS) == hash("FPS")
    assert {FPS: 1}["FPS"] == 1
    for render in (str, repr, "{}".format):
        assert render(FPS) == render(native).replace("LORA", "FPS")
    assert str(FPS).partition(".")[-1] == str(native).partition(".")[-1].replace("LORA", "FPS")  # model status
    with pytest.raises(AttributeError):
        PeftType.FPS = "other"
    with pytest.raises(AttributeError):
        del PeftType.FPS


def test_json_and_copies():
    assert json.dumps({"peft_type": FPS}) == '{"peft_type": "FPS"}'
    assert copy.copy(FPS) is FPS
    assert copy.deepcopy(FPS) is FPS
    assert copy.deepcopy([FPS])[0] is FPS


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_pickle(protocol: int):
    assert pickle.loads(pickle.dumps(FPS, protocol)) is FPS
    config = FPSConfig(target_modules=["a", "b"], importance="magnitude", budget_pattern={"a": 0.5})
    assert pickle.loads(pickle.dumps(config, protocol)) == config


def test_native_members_are_as_before():
    assert pickle.loads(pickle.dumps(PeftType.LORA)) is PeftType.LORA
    with pytest.raises(ValueError, match="NOSUCH"):
        PeftType("NOSUCH")


# --- the tables -----------------------------------------------------------------------------------------------------


def test_tables():
    for key in (FPS, "FPS"):
        assert PEFT_TYPE_TO_CONFIG_MAPPING[key] is FPSConfig
        assert PEFT_TYPE_TO_TUNER_MAPPING[key] is FPSModel
        assert PEFT_TYPE_TO_PREFIX_MAPPING[key] == "fps_" == FPSModel.prefix
        assert PEFT_TYPE_TO_MIXED_MODEL_MAPPING[key] is FPSMixedModel
    assert FPS in mixed.COMPATIBLE_TUNER_TYPES
    assert isinstance(PeftConfig.from_peft_type(peft_type="FPS", budget=0.5), FPSConfig)


def test_registering_again_changes_nothing():
    tables = (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING)
    tables = (*tables, PEFT_TYPE_TO_MIXED_MODEL_MAPPING)
    before, members = [dict(table) for table in tables], list(PeftType)
    registration.register(FPSConfig, FPSModel)
    registration.register_mixed(FPSConfig, FPSMixedModel)
    importlib.reload(registration).register(FPSConfig, FPSModel)
    importlib.reload(peft_fps)
    assert [dict(table) for table in tables] == before
    assert list(PeftType) == members
    assert PeftType("FPS") is FPS
    assert mixed.COMPATIBLE_TUNER_TYPES.count(FPS) == 1
    assert mixed.MixedModel.inject_adapter.__wrapped__ is BaseTuner.inject_adapter


@pytest.mark.parametrize(
    ("table", "ours"),
    [(PEFT_TYPE_TO_CONFIG_MAPPING, "FPSConfig"), (PEFT_TYPE_TO_TUNER_MAPPING, "FPSModel")],
    ids=["config", "tuner"],
)
def test_a_foreign_fps_is_refused(table: dict, ours: str, monkeypatch: pytest.MonkeyPatch):
    class Foreign:
        pass

    monkeypatch.setitem(table, FPS, Foreign)
    others = dict(PEFT_TYPE_TO_PREFIX_MAPPING)
    with pytest.raises(ImportError, match=rf"already has a method named 'FPS', {__name__}.*Foreign.*{ours}"):
        registration.register(FPSConfig, FPSModel)
    assert table[FPS] is Foreign
    assert others == PEFT_TYPE_TO_PREFIX_MAPPING


# --- a fresh process ------------------------------------------------------------------------------------------------

WRITE = """
def write_config(folder):
    from peft_fps import FPSConfig

    names = {f"module{i}" for i in range(20)}
    for kind, saved in (("list", sorted(names)), ("set", names)):
        FPSConfig(
            target_modules=names, exclude_modules=names, modules_to_save=saved, layers_to_transform={3, 1},
            layers_pattern=names,
        ).save_pretrained(f"{folder}/{kind}")
"""

FRESH = """
import importlib, pickle, sys

{WRITE}
objects = [pickle.loads(data) for data in pickle.load(open(sys.argv[1], "rb"))]
half = len(objects) // 2
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType
assert all(member is PeftType("FPS") is PeftType.FPS for member in objects[:half])
assert all(config.budget == 0.25 and config.peft_type is PeftType.FPS for config in objects[half:])
print(PEFT_TYPE_TO_CONFIG_MAPPING["FPS"].__name__)

import peft_fps
print([name for name in sys.modules if name.startswith(("peft_fps.bench", "matplotlib"))])
from peft_fps.sparse.kernels import cpu
print("kernels built:", cpu.library.cache_info().currsize)

write_config(sys.argv[2])

members = list(PeftType)
for name in sorted(name for name in sys.modules if name.startswith("peft_fps.")):
    importlib.reload(sys.modules[name])
importlib.reload(peft_fps)
assert list(PeftType) == members
assert PEFT_TYPE_TO_CONFIG_MAPPING["FPS"] is peft_fps.FPSConfig
for name in [name for name in sys.modules if name.partition(".")[0] == "peft_fps"]:
    del sys.modules[name]
import peft_fps
assert PEFT_TYPE_TO_CONFIG_MAPPING["FPS"] is peft_fps.FPSConfig
assert list(PeftType) == members
"""


def test_a_fresh_process_unpickles_imports_no_more_than_it_must_writes_the_same_bytes_and_reloads(tmp_path: Path):
    """One process for all of it, since the imports take their time; `finish` sees to it that it writes no errors.

    It iterates over sets in another order than this process does.
    """
    objects = [pickle.dumps(FPS, protocol) for protocol in PROTOCOLS]
    objects += [pickle.dumps(FPSConfig(budget=0.25), protocol) for protocol in PROTOCOLS]
    (tmp_path / "objects").write_bytes(pickle.dumps(objects))
    paths, here = [str(tmp_path / name) for name in ("objects", "there")], tmp_path / "here"
    printed = finish(start_python(FRESH.replace("{WRITE}", WRITE), *paths, PYTHONHASHSEED="12345"))
    assert printed == "FPSConfig\n[]\nkernels built: 0\n"
    names: dict[str, Any] = {}
    exec(WRITE, names)
    names["write_config"](here)
    for kind in ("list", "set"):
        there = tmp_path / "there" / kind / "adapter_config.json"
        assert there.read_bytes() == (here / kind / "adapter_config.json").read_bytes()
