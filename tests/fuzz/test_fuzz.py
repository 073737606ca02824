"""Damaged files at random: a few hundred of `python -m tests.fuzz`, damage by hypothesis, what was found."""

import json
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load, save_file
from torch import Tensor

from peft_fps import checkpoint
from peft_fps.lifecycle import loading
from tests.fuzz import judge as judging
from tests.fuzz.__main__ import main
from tests.fuzz.files import judge_file, judge_files
from tests.fuzz.judge import (
    CONFIG,
    DOORS,
    SELECTION,
    WEIGHTS,
    Judge,
    Violation,
    base,
    compare,
    copy_of,
    limits,
    refusal,
    state,
    without_digest,
    write_intact,
)
from tests.fuzz.mutations import BYTES, SAFETENSORS, damage_header, damage_json, join, split


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    folder = tmp_path_factory.mktemp("intact")
    write_intact(folder)
    return Judge(folder)


# --- at random ------------------------------------------------------------------------------------------------------


def test_damaged_files_are_refused_or_load_as_valid_adapters() -> None:
    result = judge_files(0, 200, seed=1)
    assert result.violations == []
    assert sum(result.outcomes.values()) == 200
    # the damage reaches every depth: some load, some are refused by each of these
    for outcome in ("loaded", "by peft_fps: ValueError", "by peft_fps: TypeError", "by json", "by safetensors"):
        assert any(outcome in found for found in result.outcomes), outcome


def test_every_file_follows_from_its_seed(judge: Judge) -> None:
    assert [judge_file(judge, f"7:{n}") for n in range(10)] == [judge_file(judge, f"7:{n}") for n in range(10)]


@pytest.mark.parametrize("damage", SAFETENSORS + BYTES, ids=lambda damage: damage.__name__)
def test_damage_of_any_kind_changes_an_intact_file(damage: Any, judge: Judge) -> None:
    data = (judge.intact / WEIGHTS).read_bytes()
    assert any(damage(data, Random(seed)) != data for seed in range(5))


# --- structural -----------------------------------------------------------------------------------------------------

DTYPES = [torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.int64, torch.float16,
          torch.bfloat16, torch.float32, torch.float64, torch.bool]  # fmt: skip


@st.composite
def tensor_damage(draw: st.DrawFn) -> Any:
    """A change of a dict of tensors that safetensors can write again."""
    kind = draw(st.sampled_from(["element", "cast", "resize", "drop", "copy", "swap", "reorder"]))
    which, other = draw(st.integers(0, 99)), draw(st.integers(0, 99))
    place, element = draw(st.integers(0, 99)), draw(st.sampled_from([0, 1, 2, 8, 15, 16, 255, 65535, -1, 2**31 - 1]))
    extreme = draw(st.sampled_from([float("nan"), float("inf"), 0.0, 3.0e38]))
    dtype, length = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 40))

    def change(tensors: dict[str, Tensor]) -> None:
        names = sorted(tensors)
        name, second = names[which % len(names)], names[other % len(names)]
        held = tensors[name].reshape(-1)
        if kind == "element" and held.numel():
            wide = held.clone() if held.is_floating_point() else held.to(torch.int64)
            wide[place % wide.numel()] = extreme if held.is_floating_point() else element
            tensors[name] = wide.to(held.dtype).reshape(tensors[name].shape)
        elif kind == "cast":
            tensors[name] = tensors[name].to(dtype)
        elif kind == "resize":
            tensors[name] = torch.cat([held, held.to(torch.int64).to(held.dtype)])[:length]
        elif kind == "drop":
            del tensors[name]
        elif kind == "copy":
            tensors[second] = tensors[name].clone()
        elif kind == "swap":
            tensors[name], tensors[second] = tensors[second], tensors[name]
        elif kind == "reorder":
            tensors[name] = tensors[name][torch.arange(len(tensors[name]) - 1, -1, -1)]

    return change


@given(
    changes=st.lists(tensor_damage(), min_size=1, max_size=4), door=st.sampled_from(sorted(DOORS)), data=st.booleans()
)
def test_structural_damage_of_tensors(judge: Judge, changes: list[Any], door: str, data: bool) -> None:
    with copy_of(judge.intact) as folder:
        path = folder / (SELECTION if data else WEIGHTS)
        header, _ = split(path.read_bytes())
        tensors = load(path.read_bytes())
        for change in changes:
            if tensors:
                change(tensors)
        path.unlink()
        held = {name: tensor.clone() for name, tensor in tensors.items()}
        save_file(held, path, header.get("__metadata__"))
        without_digest(folder)
        if data:
            judge.selection(path)
        else:
            judge.adapter(folder, door)


@given(seed=st.integers(0, 2**32), door=st.sampled_from(sorted(DOORS)))
def test_structural_damage_of_configs(judge: Judge, seed: int, door: str) -> None:
    with copy_of(judge.intact) as folder:
        content = damage_json(json.loads((folder / CONFIG).read_text()), Random(seed))
        (folder / CONFIG).write_text(json.dumps(content))
        judge.adapter(folder, door)


@pytest.mark.parametrize("claim", [2**40, 2**60])
def test_a_header_that_claims_terabytes_allocates_nothing(judge: Judge, claim: int) -> None:
    with copy_of(judge.intact) as folder:
        header, tensors = split((folder / WEIGHTS).read_bytes())
        name = next(key for key in header if key.endswith("fps_values"))
        header[name] |= {"shape": [claim], "data_offsets": [0, 4 * claim]}
        (folder / WEIGHTS).write_bytes(join(header, tensors))
        assert judge.adapter(folder, "from_pretrained") == "refused by peft_fps: ValueError"


# --- the judge itself -----------------------------------------------------------------------------------------------


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "check_contents", lambda *arguments, **options: None)


@pytest.mark.usefixtures("unchecked")
def test_the_judge_finds_what_is_not_checked(tmp_path: Path) -> None:
    write_intact(tmp_path)
    judge, wrong = Judge(tmp_path), 0
    for seed in range(60):
        with copy_of(tmp_path) as folder:
            without_digest(folder)
            (folder / WEIGHTS).write_bytes(damage_header((folder / WEIGHTS).read_bytes(), Random(seed)))
            try:
                judge.adapter(folder, "from_pretrained")
            except Violation:
                judge.ready.clear()
                wrong += 1
    assert wrong > 5


def test_the_judge_bounds_time_and_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "SECONDS", 0.05)

    def hang() -> None:
        with limits(tmp_path):
            while True:
                sum(range(1000))

    with pytest.raises(Violation, match="took longer than"):
        hang()
    monkeypatch.setattr(judging, "SECONDS", 20)
    monkeypatch.setattr(judging, "SPARE_MEMORY", -1)
    with pytest.raises(Violation, match="MiB for files"), limits(tmp_path):
        pass


def test_the_judge_compares_every_tensor_and_flag() -> None:
    model = base()
    before = state(model)
    compare(before, state(model), "nothing has changed")
    model.norm.bias.requires_grad_(False)
    with pytest.raises(Violation, match="trainable norm.bias"):
        compare(before, state(model), "changed")
    model.norm.bias.requires_grad_(True)
    model.hidden.weight.data[0, 0] += 1e-6
    with pytest.raises(Violation, match="hidden.weight"):
        compare(before, state(model), "changed")


@pytest.mark.parametrize("error", [KeyError("x"), IndexError(), AssertionError(), RuntimeError(), MemoryError()])
def test_errors_that_nobody_documents_are_violations(error: Exception) -> None:
    try:
        raise error
    except Exception as raised:
        caught = raised
    with pytest.raises(Violation):
        refusal(caught)


def test_the_command_counts_outcomes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["tests.fuzz", "--files=12", "--seed=3"])
    code, printed = main(), capsys.readouterr().out
    assert code == 0, printed
    assert "seed 3, 12 files, 0 violations" in printed
    assert sum(int(line.split()[0]) for line in printed.splitlines()[1:]) == 12


# --- found by it ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low", [False, True], ids=["", "low memory"])
def test_a_config_without_its_record_beside_tensors(judge: Judge, low: bool) -> None:
    """It was taken for a new adapter's; when the tensors did not fit that one, the base model stayed frozen."""
    with copy_of(judge.intact) as folder:
        content = json.loads((folder / CONFIG).read_text())
        changed = {"record": None, "target_modules": ["hidden"]}
        (folder / CONFIG).write_text(json.dumps(content | changed))
        model = base()
        before = state(model)
        with pytest.raises(ValueError, match=r"record is None beside the adapter's tensors.*incomplete"):
            PeftModel.from_pretrained(model, folder, low_cpu_mem_usage=low)
        compare(before, state(model), "a refused file has changed")


@pytest.mark.parametrize("name", ["modules_to_save", "layers_pattern", "target_modules", "exclude_modules"])
@pytest.mark.parametrize("expression", ["(", "x{99999999999999999999}", "(" * 5000 + ")" * 5000])
def test_expressions_that_do_not_compile(judge: Judge, expression: str, name: str) -> None:
    """They are matched within PEFT, where `re.error` and the like would come out."""
    with copy_of(judge.intact) as folder:
        content = json.loads((folder / CONFIG).read_text())
        content[name] = [expression] if name in ("modules_to_save", "layers_pattern") else expression
        (folder / CONFIG).write_text(json.dumps(content | {"layers_to_transform": None}))
        with pytest.raises(ValueError, match=f"{name} holds .*expected a valid regular expression"):
            PeftModel.from_pretrained(base(), folder)


def test_a_bit_that_flips_on_disk_is_noticed(judge: Judge) -> None:
    """Also where the damaged value would be a valid one."""
    with copy_of(judge.intact) as folder:
        header, tensors = split((folder / WEIGHTS).read_bytes())
        name = next(key for key in header if key.endswith("hidden.fps_values"))
        start = header[name]["data_offsets"][0]
        changed = tensors[:start] + bytes([tensors[start] ^ 1]) + tensors[start + 1 :]
        (folder / WEIGHTS).write_bytes(join(header, changed))
        with pytest.raises(ValueError, match="digest"):
            PeftModel.from_pretrained(base(), folder)
        without_digest(folder)
        assert checkpoint.check_folder(folder, [], pickled=False) is None
        PeftModel.from_pretrained(base(), folder)


@pytest.mark.parametrize("name", ["target_modules", "exclude_modules", "modules_to_save"])
def test_expressions_that_take_for_ever(judge: Judge, name: str) -> None:
    """Their matching grows exponentially with a module's name; the record of what is adapted needs none."""
    expression = "([a-z_.]+)+!"
    with copy_of(judge.intact) as folder:
        content = json.loads((folder / CONFIG).read_text())
        content[name] = [expression] if name == "modules_to_save" else expression
        (folder / CONFIG).write_text(json.dumps(content))
        expected = "refused by peft_fps: ValueError" if name == "modules_to_save" else "loaded"
        assert judge.adapter(folder, "from_pretrained") == expected
