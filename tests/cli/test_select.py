"""`peft-fps select`: the selection that `peft-fps finetune` would train, in a file."""

import json
from pathlib import Path

import pytest
from peft import get_peft_model
from transformers import AutoModelForImageClassification

from peft_fps import FPSConfig, Selection
from tests.cli.saved import check_user_error, run


@pytest.fixture
def arguments(image_folder: Path, tiny_model: Path) -> list[object]:
    return ["--model", tiny_model, "--data", image_folder, "--batch-size", 4, "--seed", 3]


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
    result = run("select", *arguments, *options, "--output", tmp_path / "selection")
    assert result.exit_code == 0, result.output
    trained = run("finetune", *arguments, *options, "--epochs", 1, "--output", tmp_path / "trained")
    assert trained.exit_code == 0, trained.output
    selection = Selection.load(tmp_path / "selection" / "selection.safetensors")
    expected = Selection.from_adapter(tmp_path / "trained" / "adapter")
    assert selection.modules == expected.modules
    assert selection.method == expected.method
    assert selection.entries > 0
    report = json.loads((tmp_path / "selection" / "report.json").read_text())
    results = json.loads((tmp_path / "trained" / "results.json").read_text())
    assert report["layers"] == results["selection"]["layers"]
    assert report["options"]["seed"] == 3
    assert "selected by" in result.stdout
    compared = json.loads(
        run(
            "compare", tmp_path / "selection" / "selection.safetensors", tmp_path / "trained" / "adapter", "--json"
        ).stdout
    )
    assert compared["jaccard"] == 1.0


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


def test_wrong_input_is_a_message(arguments: list[object], tmp_path: Path) -> None:
    out = ["--output", tmp_path / "out"]
    assert "there is no such file" in check_user_error(run("select", "--model", tmp_path / "nowhere", *out))
    assert "there is no such file" in check_user_error(run("select", "--data", tmp_path / "nowhere", *out))
    both = run("select", *arguments, "--budget", 0.1, "--per-neuron", 1, *out)
    assert "expected at most one" in check_user_error(both)
    assert "budget" in check_user_error(run("select", *arguments, "--budget", 0.0001, *out))
    check_user_error(run("select", *arguments, "--importance", "taste", *out), code=2)
    check_user_error(run("select", *arguments), code=2)
    data = arguments[3]
    assert isinstance(data, Path)
    inside = run("select", *arguments, "--output", data.parent, "--overwrite")
    assert "which is to be replaced, but is or holds" in check_user_error(inside)
    assert not (tmp_path / "out").exists()


def test_help_has_examples() -> None:
    text = run("select", "--help").stdout
    assert text.count("$ peft-fps select") >= 3
    assert "--granularity" in text
