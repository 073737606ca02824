"""The command as a user runs it."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTForImageClassification
from typer.testing import CliRunner

import peft_fps
from peft_fps.cli import REQUIRED, main
from peft_fps.cli.app import app
from peft_fps.vision.labelled_images import load_images


DEFAULT_MODEL = Path(peft_fps.__file__).parent / "vision" / "default_model"
SHARED = Path(__file__).parents[3] / "shared"
STAGES = ["load", "linear head", "calibrate", "train", "evaluate", "save", "merge", "verify"]
OPTIONS = (
    *("--model", "--data", "--image-column", "--label-column", "--image-size"),
    *("--preset", "--budget", "--per-neuron", "--importance", "--order", "--loss", "--granularity", "--bias"),
    "--calibration-batches",
    *("--epochs", "--learning-rate", "--bias-learning-rate", "--head-learning-rate", "--centred", "--not-centred"),
    *("--batch-size", "--precision", "--seed", "--output"),
    *("--overwrite", "--verbose"),
)


def run(*arguments, columns="200"):
    return CliRunner().invoke(app, ["finetune", *map(str, arguments)], env={"COLUMNS": columns, "NO_COLOR": "1"})


def logits_of(model, pixels, **options):
    model.eval()
    with torch.no_grad():
        return torch.cat([model(pixel_values=part, **options).logits for part in pixels.split(100)])


def test_help_is_a_page_to_work_from():
    result = run("--help")
    text = re.sub(r"\x1b\[[0-9;]*m", "", result.output)
    assert result.exit_code == 0
    for option in OPTIONS:
        assert re.search(rf"{option}\b", text), option
    assert "0.0077" in text
    assert text.count("$ peft-fps finetune") >= 4


def test_the_help_examples_name_options_that_exist():
    result = run("--help")
    for line in re.findall(r"\$ peft-fps finetune(.*)", result.output):
        assert set(re.findall(r"--[a-z-]+", line)) <= set(OPTIONS)


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "digits"
    return run("--epochs", 1, "--calibration-batches", 4, "--output", output), output


def test_embedded_default_ends_with_the_table(digits_run):
    result, output = digits_run
    assert result.exit_code == 0, result.output
    assert "selected by weight magnitude x mean |input| over 128 examples" in result.output
    results = json.loads((output / "results.json").read_text())
    for part in ("validation", "test"):
        for moment in ("before", "after"):
            assert f"{results['accuracy'][part][moment]:.2%}" in result.output
    assert f"{results['adapter_bytes']:,} bytes" in result.output
    assert list(results["seconds"]) == STAGES
    assert results["images"] == {"train": 800, "validation": 200, "test": 797}
    assert results["rates"] == pytest.approx({"bias_lr": 0.01 / 3, "head_lr": 0.01 / 3})
    assert re.search(r"other rates\W+biases 0.0033, the head 0.0033", result.output)
    assert "beta2 0.95" in result.output
    centred = "16 layers are trained with centred inputs; 3 not (no bias delta)"
    assert results["centring"] == centred
    assert centred in result.output
    assert results["options"]["epochs"] == 1
    assert results["peak_memory"]["bytes"] > 100 * 2**20


def test_embedded_default_saves_what_it_measured(digits_run):
    _, output = digits_run
    results = json.loads((output / "results.json").read_text())
    test = load_images(None, seed=0).test
    processor = AutoImageProcessor.from_pretrained(output / "merged")
    pixels = processor(list(test.images["image"]), return_tensors="pt")["pixel_values"]
    merged = logits_of(AutoModelForImageClassification.from_pretrained(output / "merged"), pixels)
    accuracy = (merged.argmax(-1) == torch.tensor(test.labels)).double().mean().item()
    assert results["accuracy"]["test"]["after"] == pytest.approx(accuracy)
    base = AutoModelForImageClassification.from_pretrained(
        DEFAULT_MODEL, num_labels=10, ignore_mismatched_sizes=True, dtype=torch.float32
    )
    adapted = logits_of(PeftModel.from_pretrained(base, output / "adapter"), pixels[:100])
    torch.testing.assert_close(adapted, merged[:100], rtol=0, atol=1e-4)
    assert results["agreement"]["merged"]["holds"]
    assert results["agreement"]["reloaded"]["holds"]


def test_embedded_default_counts_what_it_saved(digits_run):
    _, output = digits_run
    results = json.loads((output / "results.json").read_text())
    tensors = load_file(output / "adapter" / "adapter_model.safetensors")
    others = ("fps_columns", "fps_row_counts", "k_proj.fps_bias")  # the last are placeholders
    trained = sum(tensor.numel() for name, tensor in tensors.items() if not name.endswith(others))
    assert results["trainable_parameters"] == trained
    assert results["adapter_bytes"] == sum(file.stat().st_size for file in (output / "adapter").iterdir())
    assert results["selection"]["share"] <= 0.0077
    assert sorted(path.name for path in output.iterdir()) == ["adapter", "merged", "results.json", "training.png"]
    assert (output / "merged" / "preprocessor_config.json").exists()


@pytest.fixture(scope="module")
def plain_run(image_folder, tiny_model, tmp_path_factory):
    """Options, and the tensors of the adapter that they lead to."""
    output = tmp_path_factory.mktemp("runs") / "plain"
    arguments = ["--model", tiny_model, "--data", image_folder, "--budget", 0.2, "--epochs", 1]
    result = run(*arguments, "--output", output)
    assert result.exit_code == 0, result.output
    return arguments, load_file(output / "adapter" / "adapter_model.safetensors")


@pytest.mark.usefixtures("no_picture")
def test_a_folder_of_photographs(image_folder, tiny_model, tmp_path):
    output = tmp_path / "out"
    arguments = ["--model", tiny_model, "--data", image_folder, "--budget", 0.2, "--batch-size", 4]
    result = run(*arguments, "--epochs", 8, "--learning-rate", 0.01, "--seed", 3, "--output", output)
    assert result.exit_code == 0, result.output
    results = json.loads((output / "results.json").read_text())
    assert results["classes"] == ["blue", "red"]
    assert results["accuracy"]["test"]["after"] == 1.0  # one channel is bright
    config = json.loads((output / "adapter" / "adapter_config.json").read_text())
    assert [config["budget"], config["seed"]] == [0.2, 3]
    merged = ViTForImageClassification.from_pretrained(output / "merged")
    assert merged.config.id2label == {0: "blue", 1: "red"}


@pytest.mark.usefixtures("no_picture")
def test_the_same_seed_gives_the_same_adapter(plain_run, tmp_path):
    arguments, first = plain_run
    saved = {}
    for name, seed in {"again": 0, "other": 6}.items():
        assert run(*arguments, "--seed", seed, "--output", tmp_path / name).exit_code == 0
        saved[name] = load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(saved["again"][key], tensor) for key, tensor in first.items())
    assert any(not torch.equal(saved["other"][key], tensor) for key, tensor in first.items())


@pytest.mark.usefixtures("no_picture")
@pytest.mark.parametrize(
    "options",
    [
        ["--importance", "random", "--bias", "none", "--granularity", "layer", "--precision", "bf16"],
        ["--importance", "magnitude", "--granularity", "model", "--order", "bottom", "--image-size", "48"],
        ["--importance", "gradient", "--granularity", "column"],
        ["--importance", "sensitivity", "--loss", "contrastive", "--image-size", "48"],
        ["--importance", "fisher", "--granularity", "block", "--bias", "with_norms"],
        ["--importance", "movement", "--granularity", "row"],
        ["--importance", "l0"],
        ["--budget", "0", "--bias", "with_norms"],
    ],
    ids=" ".join,
)
def test_other_options(image_folder, tiny_model, tmp_path, options):
    arguments = ["--model", tiny_model, "--data", image_folder, "--epochs", 1, "--output", tmp_path / "out"]
    if "--budget" not in options:
        arguments += ["--budget", 0.2]
    result = run(*arguments, *options)
    assert result.exit_code == 0, result.output
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    side = 48 if "--image-size" in options else 32
    assert results["image_shape"] == [3, side, side]
    assert results["agreement"]["merged"]["holds"]


# what the sources train with, written down here once more; budgets are larger, since the model is tiny
TRAINED = {
    "fps": ("activation", "neuron", 0.002, 16),
    "gps": ("gradient", "neuron", 0.002, 16),
    "tr-pts": ("fisher", "block", 0.0006, 32),
    "tr-pts-parameters": ("fisher", "block", 0.0006, 32),
    "fish-mask": ("fisher", "model", None, 16),
    "far": ("movement", "row", None, 16),
    "diff-pruning": ("l0", "model", None, 8),
    "bitfit": (None, "neuron", 0.001, 8),
    "neuroada": ("magnitude", "neuron", 0.008, 8),
    "super-tuning": ("magnitude", "layer", None, 16),
}


@pytest.mark.usefixtures("no_picture")
@pytest.mark.filterwarnings("ignore:The merged model goes on selecting tokens:UserWarning")
@pytest.mark.parametrize("preset", TRAINED)
def test_every_preset_fine_tunes(image_folder, tiny_model, tmp_path, preset):
    arguments = ["--model", tiny_model, "--data", image_folder, "--preset", preset, "--epochs", 1]
    if preset == "far":  # the tiny model's biases alone exceed its budget
        arguments += ["--budget", 0.2]
    result = run(*arguments, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    importance, granularity, learning_rate, batch_size = TRAINED[preset]
    assert importance in (None, config["importance"])
    assert config["granularity"] == granularity
    recipe = results["recipe"]
    assert recipe == config["recipe"]
    assert learning_rate in (None, recipe["learning_rate"])
    assert [recipe["num_train_epochs"], recipe["per_device_train_batch_size"]] == [1, batch_size]
    assert results["selection"]["trained"] > 0
    assert results["agreement"]["merged"]["holds"]
    assert results["agreement"]["reloaded"]["holds"]
    assert re.search(rf"preset\W+{preset}", result.output)
    assert f"learning rate {recipe['learning_rate']:g}" in result.output
    assert results["selection"]["method"] in result.output


@pytest.mark.usefixtures("no_picture")
def test_options_replace_settings_of_a_preset(image_folder, tiny_model, tmp_path):
    arguments = ["--model", tiny_model, "--data", image_folder, "--preset", "gps", "--importance", "magnitude"]
    training = ["--epochs", 2, "--learning-rate", 0.005, "--batch-size", 4]
    result = run(*arguments, "--budget", 0.3, "--bias", "none", *training, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert [config["importance"], config["loss"], config["bias"]] == ["magnitude", "task", "none"]
    assert [config["budget"], config["per_neuron"]] == [0.3, None]
    recipe = results["recipe"]
    assert [recipe["num_train_epochs"], recipe["learning_rate"]] == [2, 0.005]
    assert recipe["per_device_train_batch_size"] == 4
    assert [recipe["lr_scheduler_type"], recipe["weight_decay"]] == ["cosine", 0]


def test_the_trainer_follows_the_recipe(image_folder, tiny_model, tmp_path, monkeypatch):
    seen = []

    def train(model, arguments, images, collator, **options):
        seen.append(arguments)
        return 0.0

    monkeypatch.setattr("peft_fps.vision.finetuning.train", train)
    arguments = ["--model", tiny_model, "--data", image_folder]
    for name, options in {"bitfit": ["--preset", "bitfit"], "own": ["--budget", 0.2, "--learning-rate", 0.02]}.items():
        assert run(*arguments, *options, "--output", tmp_path / name).exit_code == 0
    bitfit, own = seen
    assert [bitfit.learning_rate, bitfit.num_train_epochs, bitfit.per_device_train_batch_size] == [1e-3, 16, 8]
    assert [bitfit.lr_scheduler_type, bitfit.warmup_steps, bitfit.max_grad_norm] == ["constant", 0, 1.0]
    assert [own.learning_rate, own.num_train_epochs, own.per_device_train_batch_size] == [0.02, 30, 32]
    assert [own.lr_scheduler_type, own.warmup_steps, own.weight_decay] == ["cosine", 0.1, 0.0]


@pytest.mark.usefixtures("no_picture")
def test_a_learning_rate_that_is_looked_for(image_folder, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("peft_fps.vision.rate_trials.TRIED_RATES", (1e-6, 1e-2))
    arguments = ["--model", tiny_model, "--data", image_folder, "--preset", "fps", "--batch-size", 4, "--epochs", 4]
    arguments += ["--bias-learning-rate", 5e-3, "--head-learning-rate", 2e-3, "--centred"]
    result = run(*arguments, "--learning-rate", "auto", "--output", tmp_path / "auto")
    assert result.exit_code == 0, result.output
    results = json.loads((tmp_path / "auto" / "results.json").read_text())
    tried = {trial["rate"]: trial["accuracy"] for trial in results["learning_rate_trials"]}
    assert list(tried) == [1e-6, 1e-2]
    taken = 1e-6 if tried[1e-6] >= tried[1e-2] else 1e-2
    config = json.loads((tmp_path / "auto" / "adapter" / "adapter_config.json").read_text())
    assert results["recipe"]["learning_rate"] == config["recipe"]["learning_rate"] == taken
    assert f"taken: {taken:g}, the best" in result.output
    assert run(*arguments, "--learning-rate", taken, "--output", tmp_path / "given").exit_code == 0
    found, given = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("auto", "given"))
    assert all(torch.equal(found[name], given[name]) for name in found.keys() | given.keys())


@pytest.mark.parametrize(
    ("options", "rates", "centred"),
    [
        ([], {"bias_lr": 1e-2 / 3, "head_lr": 1e-2 / 3}, None),
        (["--head-learning-rate", 4e-3, "--learning-rate", 3e-3], {"bias_lr": 1e-3, "head_lr": 4e-3}, None),
        (["--bias-learning-rate", 2e-3, "--centred"], {"bias_lr": 2e-3, "head_lr": 1e-2 / 3}, True),
        (["--bias", "none", "--not-centred"], {"head_lr": 1e-2 / 3}, False),
        (["--budget", 0], {}, None),
        (["--preset", "fps"], {}, False),
        (["--preset", "fps", "--head-learning-rate", 3e-3, "--centred"], {"head_lr": 3e-3}, True),
    ],
)
def test_how_biases_head_and_inputs_are_trained(
    image_folder, tiny_model, tmp_path, monkeypatch, options, rates, centred
):
    seen = []
    monkeypatch.setattr("peft_fps.vision.finetuning.train", lambda *args, callbacks: seen.append(callbacks[-1]) or 0.0)
    arguments = ["--model", tiny_model, "--data", image_folder, "--output", tmp_path / "out"]
    if "--budget" not in options:
        arguments += ["--budget", 0.2]
    assert run(*arguments, *options).exit_code == 0
    assert seen[0].rates == pytest.approx(rates)
    assert seen[0].centred is centred


@pytest.mark.usefixtures("no_picture")
def test_centred_inputs_need_biases(image_folder, tiny_model, tmp_path):
    arguments = ["--model", tiny_model, "--data", image_folder, "--budget", 0.2, "--epochs", 1]
    result = run(*arguments, "--bias", "none", "--centred", "--output", tmp_path / "out")
    assert result.exit_code == 1
    assert "--centred lets biases take over what entries shift" in " ".join(result.output.split())
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_views_need_a_library(image_folder, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "kornia.augmentation", None)
    arguments = ["--model", tiny_model, "--data", image_folder, "--preset", "gps", "--output", tmp_path / "out"]
    result = run(*arguments)
    assert result.exit_code == 1
    assert "peft-fps[views]" in result.output
    assert "linear head" not in result.output  # said before any work


@pytest.mark.usefixtures("no_picture")
def test_images_that_do_not_fit_in_memory(plain_run, tmp_path, monkeypatch):
    arguments, kept = plain_run
    monkeypatch.setattr("peft_fps.vision.pixels.MEMORY_LIMIT", 0)
    result = run(*arguments, "--output", tmp_path / "lazy")
    assert result.exit_code == 0, result.output
    lazy = load_file(tmp_path / "lazy" / "adapter" / "adapter_model.safetensors")
    for key, tensor in kept.items():
        torch.testing.assert_close(lazy[key], tensor)


@pytest.mark.usefixtures("no_picture")
def test_a_merged_model_that_differs_is_an_error(image_folder, tiny_model, tmp_path, monkeypatch):
    honest = AutoModelForImageClassification.from_pretrained

    def tampered(folder, **options):
        model = honest(folder, **options)
        if Path(folder).name == "merged":
            model.classifier.bias.data[0] += 0.01
        return model

    monkeypatch.setattr("peft_fps.vision.finetuning.AutoModelForImageClassification.from_pretrained", tampered)
    arguments = ["--model", tiny_model, "--data", image_folder, "--budget", 0.2, "--epochs", 1]
    result = run(*arguments, "--output", tmp_path / "out")
    assert result.exit_code == 1
    assert "does not predict what the trained model does" in result.output
    agreement = json.loads((tmp_path / "out" / "results.json").read_text())["agreement"]
    assert agreement["merged"]["largest_difference"] == pytest.approx(0.01, abs=1e-5)
    assert [agreement["merged"]["holds"], agreement["reloaded"]["holds"]] == [False, True]


@pytest.mark.usefixtures("no_picture")
def test_a_full_output_folder_is_left_alone(image_folder, tiny_model, tmp_path):
    output = tmp_path / "out"
    (output / "adapter").mkdir(parents=True)
    (output / "adapter" / "old.txt").write_text("old")
    (output / "mine.txt").write_text("mine")
    arguments = ["--model", tiny_model, "--data", image_folder, "--budget", 0.2, "--epochs", 1, "--output", output]
    result = run(*arguments)
    assert result.exit_code == 1
    assert result.output.strip().count("\n") == 0
    assert "not empty" in result.output
    assert (output / "adapter" / "old.txt").exists()
    assert run(*arguments, "--overwrite").exit_code == 0
    assert not (output / "adapter" / "old.txt").exists()
    assert (output / "mine.txt").read_text() == "mine"


def test_a_model_that_would_be_overwritten_is_refused(image_folder, tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "out" / "merged")
    arguments = ["--model", tmp_path / "out" / "merged", "--data", image_folder, "--output", tmp_path / "out"]
    result = run(*arguments, "--overwrite")
    assert result.exit_code == 1
    assert "lies in the folder to be overwritten" in result.output
    assert (tmp_path / "out" / "merged" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--data", "./no/such/folder"], 1, "--data is './no/such/folder': there is no such file or folder."),
        (["--model", "./no/such/folder"], 1, "--model is './no/such/folder': there is no such file or folder."),
        (["--budget", "2"], 1, "budget is 2.0, expected a finite number between 0 and 1."),
        (["--budget", "0.1", "--per-neuron", "2"], 1, "budget=0.1 and per_neuron=2.0 were both given"),
        (["--epochs", "0"], 2, "--epochs"),
        (["--learning-rate", "0"], 2, "0.0 is not a positive number"),
        (["--learning-rate", "nan"], 2, "nan is not a positive number"),
        (["--learning-rate", "fast"], 2, "'fast' is neither a number nor auto"),
        (["--importance", "astrology"], 2, "astrology"),
        (["--preset", "alchemy"], 2, "'alchemy' is none of fps, gps, tr-pts, tr-pts-parameters,"),
        (["--preset", "gps", "--budget", "0.1", "--per-neuron", "2"], 1, "budget=0.1 and per_neuron=2.0 were both"),
        (["--loss", "contrastive"], 1, "loss='contrastive' was given with importance='activation'"),
        (["--precision", "fp8"], 2, "fp8"),
        (["--seed", "-1"], 2, "--seed"),
        (["--nonsense"], 2, "--nonsense"),
    ],
)
def test_mistakes_end_with_one_clear_message(tmp_path, arguments, code, message):
    result = run(*arguments, "--output", tmp_path / "out", "--epochs", "1", *arguments)
    assert result.exit_code == code
    assert message in result.output
    assert "Traceback" not in result.output


def test_a_budget_that_nothing_fits_in_ends_with_one_clear_message(image_folder, tiny_model, tmp_path):
    arguments = ["--model", tiny_model, "--data", image_folder, "--budget", 0.0001, "--epochs", 1]
    result = run(*arguments, "--output", tmp_path / "out")
    assert result.exit_code == 1
    assert "Error: budget" in result.output
    assert "Traceback" not in result.output


def test_a_training_that_diverges_says_so(image_folder, tiny_model, tmp_path):
    arguments = ["--model", tiny_model, "--data", image_folder, "--budget", 0.2, "--epochs", 1, "--batch-size", 1]
    result = run(*arguments, "--learning-rate", 1e30, "--output", tmp_path / "out")
    assert result.exit_code == 1
    assert "lower --learning-rate" in result.output
    assert not (tmp_path / "out" / "adapter").exists()


@pytest.mark.parametrize("name", REQUIRED)
def test_a_missing_library_is_one_line(monkeypatch, capsys, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert exit_info.value.code == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert name in error
    assert "peft-fps[cli]" in error


@pytest.mark.skipif(not (SHARED / "tasks").is_dir(), reason="no folder shared/ beside the repository")
def test_a_real_vit_on_real_photographs(tmp_path):
    data = tmp_path / "hands"
    data.mkdir()
    source = SHARED / "tasks" / "sign_digits"
    for split, rows in {"train": 40, "validation": 16, "test": 16}.items():
        part = load_dataset("parquet", data_files=str(source / f"{split}.parquet"), split="train")
        part.shuffle(seed=0).select(range(rows)).to_parquet(data / f"{split}.parquet")
    shutil.copy(source / "meta.json", data)
    model = SHARED / "models" / "vit-tiny-patch16-224-tinyimagenet"
    result = run("--model", model, "--data", data, "--image-size", 64, "--epochs", 1, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["classes"] == list("0123456789")
    assert results["images"] == {"train": 40, "validation": 16, "test": 16}
    assert results["image_shape"] == [3, 64, 64]
    assert results["agreement"]["merged"]["different_predictions"] == 0
    assert results["agreement"]["reloaded"]["different_predictions"] == 0
    assert results["selection"]["base_parameters"] == 5_524_416
