"""The command as a user runs it."""

import json
import re

import pytest
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageClassification
from typer.testing import CliRunner

from peft_fps.cli.app import app
from tests.reproduce.layouts import write_fgvc, write_vtab


OPTIONS = (
    *("--task", "--data", "--image-column", "--label-column", "--model", "--method", "--train-on-all"),
    *("--precision", "--per-neuron", "--epochs", "--learning-rate", "--batch-size", "--warm-up", "--drop-path"),
    *("--ema", "--augmentation", "--image-size", "--seed", "--limit", "--output", "--overwrite", "--verbose"),
)


def run(*arguments):
    return CliRunner().invoke(
        app, ["reproduce", *map(str, arguments)], env={"COLUMNS": "200", "NO_COLOR": "1"}, catch_exceptions=False
    )


@pytest.mark.parametrize("command", ["vtab-1k", "fgvc"])
def test_help_is_a_page_to_work_from(command):
    text = re.sub(r"\x1b\[[0-9;]*m", "", run(command, "--help").output)
    for option in OPTIONS:
        assert re.search(rf"{option}\b", text), option
    examples = re.findall(rf"\$ peft-fps reproduce {command} (.*)", text)
    assert len(examples) == 3
    for line in examples:
        assert set(re.findall(r"--[a-z-]+", line)) <= set(OPTIONS)
    assert 'pip install "peft-fps[reproduce]"' in " ".join(text.replace("│", " ").split())
    assert {"vtab-1k": "smallnorb_azi", "fgvc": "nabirds"}[command] in text
    assert {"vtab-1k": "train800val200.txt", "fgvc": "val.json"}[command] in text


def test_help_lists_both_benchmarks():
    output = run("--help").output
    assert "vtab-1k" in output
    assert "fgvc" in output


@pytest.fixture
def vtab_run(tmp_path, tiny_model):
    folder = write_vtab(tmp_path / "vtab-1k" / "dtd", train=24)
    output = tmp_path / "out"
    arguments = ["--task", "dtd", "--data", tmp_path / "vtab-1k", "--model", tiny_model, "--image-size", 32]
    training = ["--epochs", 4, "--batch-size", 4, "--learning-rate", 0.02, "--per-neuron", 2]
    return run("vtab-1k", *arguments, *training, "--output", output), folder, output


def test_vtab_from_its_own_files(vtab_run, tiny_model):
    result, folder, output = vtab_run
    assert result.exit_code == 0, result.output
    results = json.loads((output / "results.json").read_text())
    assert results["images"] == {"train": 24, "validation": 6, "test": 8}
    assert results["data"] == str(folder)
    assert f"{results['accuracy']['test']:.2%}" in result.output
    assert results["accuracy"]["validation"] == max(entry["raw"] for entry in results["epochs"])
    assert results["epochs"][results["kept"]["epoch"] - 1]["raw"] == results["accuracy"]["validation"]
    assert [entry["epoch"] for entry in results["epochs"]] == [1, 2, 3, 4]
    assert results["published"] == {"gps": 75.8, "fps": 75.4}
    assert {"model", "image_size", "epochs", "batch_size", "per_neuron", "classes", "training_images"} <= set(
        results["differences"]
    )
    assert results["differences"]["per_neuron"] == {"recipe": 1, "here": 2.0}
    assert "differs: per_neuron" in result.output
    assert "110 epochs" in " ".join(result.output.replace("│", " ").split())
    assert sorted(path.name for path in output.iterdir()) == ["adapter", "results.json"]


def test_the_saved_adapter_has_the_test_accuracy(vtab_run, tiny_model):
    _, folder, output = vtab_run
    base = AutoModelForImageClassification.from_pretrained(
        tiny_model, num_labels=2, ignore_mismatched_sizes=True, dtype=torch.float32
    )
    model = PeftModel.from_pretrained(base, output / "adapter").eval()
    right = 0
    for line in (folder / "test.txt").read_text().splitlines():
        name, label = line.split()
        levels = torch.tensor(list(Image.open(folder / name).convert("RGB").tobytes())).view(32, 32, 3)
        pixels = (levels.permute(2, 0, 1) / 255 - 0.5) / 0.5
        with torch.no_grad():
            right += int(model(pixel_values=pixels[None]).logits.argmax()) == int(label)
    results = json.loads((output / "results.json").read_text())
    assert results["accuracy"]["test"] == right / 8
    assert right >= 6  # red and green images


def test_fgvc_with_augmentation_drop_path_and_average(tmp_path, tiny_model):
    folder = write_fgvc(tmp_path / "birds", train=16)
    output = tmp_path / "out"
    arguments = ["--task", "nabirds", "--data", folder, "--model", tiny_model, "--image-size", 24, "--method", "gps"]
    training = ["--epochs", 2, "--batch-size", 4, "--per-neuron", 1, "--ema", 0.5, "--limit", 10]
    result = run("fgvc", *arguments, *training, "--output", output)
    assert result.exit_code == 0, result.output
    results = json.loads((output / "results.json").read_text())
    assert results["images"] == {"train": 10, "validation": 6, "test": 8}
    assert results["settings"]["drop_path"] == 0.1
    assert results["settings"]["augmentation"] is True
    assert all(set(entry) == {"epoch", "raw", "averaged"} for entry in results["epochs"])
    assert results["accuracy"]["validation"] == max(max(e["raw"], e["averaged"]) for e in results["epochs"])
    assert results["selection"]["method"].startswith("|sum of gradients|, contrastive loss")
    assert results["differences"]["ema"] == {"recipe": 0.9998, "here": 0.5}
    assert "training_images" not in results["differences"]


@pytest.mark.parametrize(
    ("command", "task", "method", "training_mode", "mixed"),
    [("fgvc", "cub", "fps", False, True), ("fgvc", "cub", "gps", True, True), ("vtab-1k", "dtd", "gps", True, False)],
)
def test_gps_selects_in_training_mode_and_fgvc_is_mixed(
    tmp_path, tiny_model, monkeypatch, command, task, method, training_mode, mixed
):
    from peft_fps import model as tuner
    from peft_fps.reproduce import reproduction as stages

    asked = {}
    calibrate, fit = tuner.calibrate, stages.fit

    def spied_calibrate(model, data, **options):
        asked["training_mode"] = options["training_mode"]
        return calibrate(model, data, **options)

    def spied_fit(model, arguments, images, collator, best, soft):
        batch = collator([images[row] for row in range(2)])
        asked["shape"], asked["soft"] = tuple(batch["labels"].shape), soft
        return fit(model, arguments, images, collator, best, soft)

    monkeypatch.setattr(tuner, "calibrate", spied_calibrate)
    monkeypatch.setattr(stages, "fit", spied_fit)
    folder = (write_fgvc if command == "fgvc" else write_vtab)(tmp_path / "x")
    arguments = ["--task", task, "--data", folder, "--model", tiny_model, "--image-size", 32, "--method", method]
    result = run(command, *arguments, "--epochs", 1, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert asked == {"training_mode": training_mode, "shape": (2, 2) if mixed else (2,), "soft": mixed}


def test_training_on_all_keeps_the_last_epoch(tmp_path, tiny_model):
    folder = write_vtab(tmp_path / "svhn")
    for name in ("train800.txt", "val200.txt"):
        (folder / name).unlink()
    output = tmp_path / "out"
    arguments = ["--task", "svhn", "--data", folder, "--model", tiny_model, "--image-size", 32, "--train-on-all"]
    result = run("vtab-1k", *arguments, "--epochs", 2, "--output", output)
    assert result.exit_code == 0, result.output
    results = json.loads((output / "results.json").read_text())
    assert results["images"] == {"train": 18, "test": 8}
    assert results["kept"] == {"epoch": 2, "weights": "raw", "chosen_by": "the last epoch"}
    assert results["epochs"] == []
    assert set(results["accuracy"]) == {"test"}


def test_another_folder_of_images(image_folder, tiny_model, tmp_path):
    output = tmp_path / "out"
    arguments = ["--task", "eurosat", "--data", image_folder, "--model", tiny_model, "--image-size", 32]
    result = run("vtab-1k", *arguments, "--epochs", 1, "--output", output)
    assert result.exit_code == 0, result.output
    results = json.loads((output / "results.json").read_text())
    assert results["classes"] == ["blue", "red"]
    assert results["differences"]["classes"] == {"recipe": 10, "here": 2}


def test_the_same_seed_gives_the_same_numbers(tmp_path, tiny_model):
    folder = write_fgvc(tmp_path / "birds")
    losses = []
    for number, seed in enumerate((1, 1, 2)):
        output = tmp_path / f"out{number}"
        arguments = ["--task", "cub", "--data", folder, "--model", tiny_model, "--image-size", 32, "--seed", seed]
        result = run("fgvc", *arguments, "--epochs", 1, "--batch-size", 4, "--output", output)
        assert result.exit_code == 0, result.output
        losses.append(json.loads((output / "results.json").read_text())["training_loss"])
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("task", ["birds", "cub"])
def test_an_unknown_task_is_answered_with_those_that_there_are(task):
    result = run("vtab-1k", "--task", task, "--data", "x")
    assert result.exit_code == 2
    text = " ".join(result.output.replace("│", " ").split())
    assert f"'{task}' is no task of VTAB-1k: caltech101, cifar100," in text


@pytest.mark.parametrize(
    ("option", "value"), [("--method", "lora"), ("--drop-path", 1), ("--ema", -0.1), ("--precision", "fp8")]
)
def test_a_single_wrong_option(option, value):
    result = run("fgvc", "--task", "cub", "--data", "x", option, value)
    assert result.exit_code == 2
    assert option in result.output


def test_what_cannot_be_used_ends_before_anything_is_written(tmp_path, tiny_model):
    folder = write_vtab(tmp_path / "dtd")
    output = tmp_path / "out"
    common = ["vtab-1k", "--task", "dtd", "--model", tiny_model, "--output", output]
    (folder / "images/val200/001.png").unlink()
    result = run(*common, "--data", folder)
    assert result.exit_code == 1
    assert "val200.txt, line 2: there is no image" in result.output
    (folder / "val200.txt").unlink()
    assert "lacks val200.txt: looked for train800.txt, val200.txt, test.txt" in run(*common, "--data", folder).output
    result = run(*common, "--data", tmp_path / "nowhere")
    assert result.exit_code == 1
    assert "there is no such file or folder" in result.output
    assert not output.exists() or not any(output.iterdir())


def test_an_output_folder_that_is_not_empty(tmp_path, tiny_model):
    folder = write_vtab(tmp_path / "dtd")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").write_text("mine")
    result = run("vtab-1k", "--task", "dtd", "--data", folder, "--model", tiny_model, "--output", tmp_path / "out")
    assert result.exit_code == 1
    assert "add --overwrite" in result.output


def test_the_papers_model_without_timm(tmp_path, monkeypatch):
    from peft_fps.vision import timm_names

    def fail(name):
        raise ImportError("No module named 'timm'")

    monkeypatch.setattr(timm_names, "import_module", fail)
    result = run("vtab-1k", "--task", "dtd", "--data", write_vtab(tmp_path / "x"), "--output", tmp_path / "out")
    assert result.exit_code == 1
    assert 'Install it with `pip install "peft-fps[reproduce]"`' in result.output
    assert not (tmp_path / "out").exists()
