"""`peft-fps inspect`: what it tells, against the file's own tensors, and every check it makes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from peft_fps.adapter_folders import sources
from tests.cli.saved import CONFIG, PREFIX, WEIGHTS, check_user_error, edit_config, edit_tensors, run, save_adapted
from tests.support.helpers import tiny_mlp, tiny_vit


MODULE = "vit.layers.0.mlp.fc1"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    save_adapted(tiny_vit(), folder, Path("some/model"), granularity="layer")
    return folder


@pytest.fixture
def adapter(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "adapter"))


def test_figures_are_those_of_the_file(adapter: Path) -> None:
    result = run("inspect", adapter, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in load_file(adapter / WEIGHTS).items()}
    modules = sorted({key.rpartition(".")[0] for key in tensors if key.endswith("fps_values")})
    assert sorted(row["module"] for row in found["modules"]) == modules
    for row in found["modules"]:
        held = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{row['module']}.fps_")}
        assert row["entries"] == held[f"{row['module']}.fps_values"].numel()
        assert row["neurons"] == held[f"{row['module']}.fps_row_counts"].numel()
        assert row["biases"] == (0 if "k_proj" in row["module"] else held[f"{row['module']}.fps_bias"].numel())
        assert row["bytes"] == sum(tensor.numel() * tensor.element_size() for tensor in held.values())
        assert row["share"] == pytest.approx(row["entries"] / (row["neurons"] * row["inputs"]))
    heads = {key: tensor for key, tensor in tensors.items() if ".fps_" not in key}
    assert {name: head["shape"] for name, head in found["heads"].items()} == {
        "classifier.weight": [5, 32],
        "classifier.bias": [5],
    }
    totals = found["totals"]
    assert totals["head_parameters"] == sum(tensor.numel() for tensor in heads.values())
    assert totals["entries"] == sum(tensor.numel() for key, tensor in tensors.items() if key.endswith("fps_values"))
    assert totals["file_bytes"] == (adapter / WEIGHTS).stat().st_size
    config = json.loads((adapter / CONFIG).read_text())
    assert found["base_model"]["name"] == "some/model"
    assert found["base_model"]["fingerprint"] == config["record"]["base_fingerprint"]
    assert found["config"]["granularity"] == "layer"
    assert found["passed"]
    assert {check["name"]: check["passed"] for check in found["checks"]} == dict.fromkeys(
        ("config", "file", "digest", "entries", "heads"), True
    )


def test_the_tables_name_everything(adapter: Path) -> None:
    result = run("inspect", adapter)
    assert result.exit_code == 0, result.output
    for text in (MODULE, "total", "some/model", "weight magnitude", "granularity='layer'", "classifier.weight"):
        assert text in result.stdout
    assert result.stdout.count("passed") == 5


def test_blocks_stand_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    base = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(11)))
    save_adapted(base, tmp_path, target_modules=[str(number) for number in range(11)])
    found = json.loads(run("inspect", tmp_path, "--json").stdout)
    assert [row["module"] for row in found["modules"]] == [str(number) for number in range(11)]


def test_an_adapter_of_biases_alone_passes(tmp_path: Path) -> None:
    save_adapted(tiny_vit(), tmp_path, budget=0, bias="with_norms")
    found = json.loads(run("inspect", tmp_path, "--json").stdout)
    assert found["passed"]
    assert found["totals"]["entries"] == 0
    norms = [row for row in found["modules"] if not row["inputs"]]
    assert len(norms) == 5
    assert all(row["biases"] == 32 for row in norms)


def _other_value(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors[f"{PREFIX}{MODULE}.fps_values"][0] += 1e-3
    save_file(tensors, folder / WEIGHTS)


def _half_a_file(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:1000])


def _field(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, **changes)


def _tensor(name: str, value: torch.Tensor | None) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder, {name: value})


COLUMNS, VALUES, BIAS = (f"{MODULE}.fps_{kind}" for kind in ("columns", "values", "bias"))
UNORDERED, BEYOND = (torch.full((128,), column, dtype=torch.uint16) for column in (0, 999))
DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "newer format": ("config", _field(format_version=99), "format_version is 99"),
    "wrong field": ("config", _field(granularity="atom"), "granularity is 'atom'"),
    "no sizes": ("config", _field(allocation=None), "allocation is None"),
    "no record": ("config", _field(record=None), "record is None"),
    "no file": ("file", lambda folder: (folder / WEIGHTS).unlink(), "there is no adapter_model.safetensors"),
    "half a file": ("file", _half_a_file, "not a readable safetensors file"),
    "half a head": ("file", _tensor("classifier.bias", None), "lacks classifier.bias"),
    "another value": ("digest", _other_value, "holds tensors with the digest"),
    "NaN": ("entries", _tensor(VALUES, torch.full((128,), torch.nan)), MODULE),
    "shape": ("entries", _tensor(BIAS, torch.zeros(3)), MODULE),
    "dtype": ("entries", _tensor(COLUMNS, torch.zeros(128, dtype=torch.int64)), "fps_columns has dtype torch.int64"),
    "order": ("entries", _tensor(COLUMNS, UNORDERED), MODULE),
    "range": ("entries", _tensor(COLUMNS, BEYOND), MODULE),
    "a stranger": ("entries", _tensor("other.fps_values", torch.zeros(1)), "other"),
    "no columns": ("entries", _tensor(COLUMNS, None), "expected"),
    "a base weight": ("heads", _tensor("vit.layernorm.bias", torch.zeros(32)), "vit.layernorm.bias"),
    "NaN in the head": ("heads", _tensor("classifier.bias", torch.full((5,), torch.nan)), "classifier.bias"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damage_fails_the_check_that_is_for_it(adapter: Path, damage: str) -> None:
    name, do, says = DAMAGES[damage]
    do(adapter)
    result = run("inspect", adapter, "--json")
    message = check_user_error(result)
    found = json.loads(result.stdout)
    assert not found["passed"]
    assert [check["name"] for check in found["checks"] if check["passed"] is False] == [name]
    assert f"does not pass: {name}: " in message
    assert says in message
    table = run("inspect", adapter)
    assert table.exit_code == 1
    assert table.stdout.count("FAILED") == 1


def test_what_is_no_fps_adapter_is_refused(tmp_path: Path, adapter: Path) -> None:
    lora = get_peft_model(tiny_mlp(), LoraConfig(target_modules=["first"]))
    lora.save_pretrained(tmp_path / "lora")
    assert "method LORA, expected one that was saved with FPS" in check_user_error(run("inspect", tmp_path / "lora"))
    assert "there is no such file or folder" in check_user_error(run("inspect", tmp_path / "nowhere"))
    assert "is a file, expected the folder" in check_user_error(run("inspect", adapter / WEIGHTS))
    assert "Adapters are in its folders adapter, lora." in check_user_error(run("inspect", tmp_path))
    (adapter / CONFIG).write_text("{")
    assert "not a readable JSON file" in check_user_error(run("inspect", adapter))
    assert "could be fetched" in check_user_error(run("inspect", "nobody/nothing"))
    check_user_error(run("inspect"), code=2)


def test_strange_records_are_no_tracebacks(adapter: Path) -> None:
    edit_config(adapter, auto_mapping={"base_model_class": 5}, base_model_name_or_path="5", revision="[bold]")
    assert "5, revision [bold]" in run("inspect", adapter).stdout
    edit_config(adapter, auto_mapping=["os", "system"], base_model_name_or_path=5)
    assert json.loads(run("inspect", adapter, "--json").stdout)["base_model"]["class"] is None
    assert run("inspect", adapter).exit_code == 1
    check_user_error(run("merge", adapter, "--output", adapter / "out"))
    plain = {"auto_mapping": None, "base_model_name_or_path": None}
    edit_config(adapter, calibration={"combination": "ties", "adapters": 5}, **plain)
    check_user_error(run("inspect", adapter))


def test_a_name_on_the_hub_is_fetched(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetched(repository: str, name: str, revision: str | None) -> str:
        asked.append((repository, name, revision))
        return str(adapter / name)

    monkeypatch.setattr(sources, "hf_hub_download", fetched)
    assert run("inspect", "me/adapter", "--revision", "v2", "--json").exit_code == 0
    assert asked == [("me/adapter", CONFIG, "v2"), ("me/adapter", WEIGHTS, "v2")]


def test_a_picture_is_drawn(adapter: Path, tmp_path: Path) -> None:
    picture = tmp_path / "new" / "selection.png"
    assert run("inspect", adapter, "--picture", picture).exit_code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
