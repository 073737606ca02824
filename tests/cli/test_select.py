"""`peft-fps select`: the selection that `peft-fps finetune` would train, in a file."""

import json
from pathlib import Path

import pytest
from peft import get_peft_model
from transformers import AutoModelForImageClassification

from peft_fps import FPSConfig, Selection
from tests.cli.saved import check_user_error, finish, run


@pytest.fixture
def arguments(tiny_task: list[object]) -> list[object]:
    return [*tiny_task, "--batch-size", 4, "--seed", 3]


@pytest.mark.parametrize(
    "options",
    [
        ["--per-neuron", 2],
        ["--budget", 0.2, "--granularity", "model", "--bias", "none", "--calibration-batches", 2],
        ["--per-neuron", 1, "--importance", "gradient"],
    ],
    ids=["fps", "few batches", "gradient"],
)
def test_the_selection_is_the_one_that_finetune_trains(
    arguments: list[object], options: list[object], tmp_path: Path
) -> None:
    selected = finish(tmp_path / "selection", "select", *arguments, *options)
    trained = finish(tmp_path / "trained", "finetune", *arguments, *options, "--epochs", 1)
    file, adapter = selected.folder / "selection.safetensors", trained.folder / "adapter"
    selection, expected = Selection.load(file), Selection.from_adapter(adapter)
    assert selection.modules == expected.modules
    assert selection.method == expected.method
    assert selection.entries > 0
    report = json.loads((selected.folder / "report.json").read_text())
    assert report["layers"] == trained.results["selection"]["layers"]
    assert report["options"]["seed"] == 3
    assert "selected by" in selected.printed
    assert json.loads(run("compare", file, adapter, "--json").stdout)["jaccard"] == 1.0


def test_a_program_can_apply_it(arguments: list[object], tiny_model: Path, tmp_path: Path) -> None:
    run("select", *arguments, "--per-neuron", 2, "--output", tmp_path / "out")
    selection = Selection.load(tmp_path / "out" / "selection.safetensors")
    model = get_peft_model(
        AutoModelForImageClassification.from_pretrained(tiny_model), FPSConfig(per_neuron=1, importance="random")
    )
    selection.apply(model)
    assert Selection.of(model).modules == selection.modules


def test_json_is_all_there_is_on_stdout(arguments: list[object], tmp_path: Path) -> None:
    result = run("select", *arguments, "--per-neuron", 2, "--output", tmp_path / "out", "--json")
    found = json.loads(result.stdout)
    assert found["selection"] == str(tmp_path / "out" / "selection.safetensors")
    assert found["entries"] == sum(layer["entries"] for layer in found["layers"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.json", "selection.safetensors"]


def test_an_earlier_selection_is_replaced_only_if_told(arguments: list[object], tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "old").write_text("")
    given = [*arguments, "--importance", "magnitude", "--per-neuron", 1, "--output", output]
    assert "is not empty" in check_user_error(run("select", *given))
    assert run("select", *given, "--overwrite").exit_code == 0
    assert not (output / "old").exists()


def test_wrong_input_is_a_message(arguments: list[object], image_folder: Path, tmp_path: Path) -> None:
    out = ["--output", tmp_path / "out"]
    assert "there is no such file" in check_user_error(run("select", "--model", tmp_path / "nowhere", *out))
    assert "there is no such file" in check_user_error(run("select", "--data", tmp_path / "nowhere", *out))
    both = run("select", *arguments, "--budget", 0.1, "--per-neuron", 1, *out)
    assert "expected at most one" in check_user_error(both)
    assert "budget" in check_user_error(run("select", *arguments, "--budget", 0.0001, *out))
    check_user_error(run("select", *arguments, "--importance", "taste", *out), code=2)
    check_user_error(run("select", *arguments), code=2)
    inside = run("select", *arguments, "--output", image_folder.parent, "--overwrite")
    assert "which is to be replaced, but is or holds" in check_user_error(inside)
    assert not (tmp_path / "out").exists()
