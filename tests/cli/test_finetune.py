"""The command as a user runs it."""

import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from peft import PeftModel
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTForImageClassification

import peft_fps
from peft_fps.cli import REQUIRED, main
from peft_fps.vision.labelled_images import load_images
from tests.cli.saved import Finished, check_user_error, finish, run


DEFAULT_MODEL = Path(peft_fps.__file__).parent / "vision" / "default_model"
SHARED = Path(__file__).parents[3] / "shared"
STAGES = ["load", "linear head", "calibrate", "train", "evaluate", "save", "merge", "verify"]


def logits_of(model, pixels):
    model.eval()
    with torch.no_grad():
        return torch.cat([model(pixel_values=part).logits for part in pixels.split(100)])


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "digits"
    return finish(output, "finetune", "--epochs", 1, "--calibration-batches", 4)


def test_embedded_default_ends_with_the_table(digits_run):
    printed, results = digits_run.printed, digits_run.results
    assert "selected by weight magnitude x mean |input| over 128 examples" in printed
    for part in ("validation", "test"):
        for moment in ("before", "after"):
            assert f"{results['accuracy'][part][moment]:.2%}" in printed
    assert f"{results['adapter_bytes']:,} bytes" in printed
    assert list(results["seconds"]) == STAGES
    assert results["images"] == {"train": 800, "validation": 200, "test": 797}
    assert results["rates"] == pytest.approx({"bias_lr": 0.01 / 3, "head_lr": 0.01 / 3})
    assert re.search(r"other rates\W+biases 0.0033, the head 0.0033", printed)
    assert "beta2 0.95" in printed
    centred = "16 layers are trained with centred inputs; 3 not (no bias delta)"
    assert results["centring"] == centred
    assert centred in printed
    assert results["options"]["epochs"] == 1
    assert results["peak_memory"]["bytes"] > 100 * 2**20


def test_embedded_default_saves_what_it_measured(digits_run):
    results, output = digits_run.results, digits_run.folder
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
    results, output = digits_run.results, digits_run.folder
    others = ("fps_columns", "fps_row_counts", "k_proj.fps_bias")  # the last are placeholders
    trained = sum(tensor.numel() for name, tensor in digits_run.tensors.items() if not name.endswith(others))
    assert results["trainable_parameters"] == trained
    assert results["adapter_bytes"] == sum(file.stat().st_size for file in (output / "adapter").iterdir())
    assert results["selection"]["share"] <= 0.0077
    assert sorted(path.name for path in output.iterdir()) == ["adapter", "merged", "results.json", "training.png"]
    assert (output / "merged" / "preprocessor_config.json").exists()


@pytest.fixture(scope="module")
def plain_run(tiny_task, tmp_path_factory):
    """Options, and the tensors of the adapter that they lead to."""
    options = [*tiny_task, "--budget", 0.2, "--epochs", 1]
    return options, finish(tmp_path_factory.mktemp("runs") / "plain", "finetune", *options).tensors


@pytest.mark.usefixtures("no_picture")
def test_a_folder_of_photographs(tiny_task, tmp_path):
    training = ["--batch-size", 4, "--epochs", 8, "--learning-rate", 0.01, "--seed", 3]
    done = finish(tmp_path / "out", "finetune", *tiny_task, "--budget", 0.2, *training)
    assert done.results["classes"] == ["blue", "red"]
    assert done.results["accuracy"]["test"]["after"] == 1.0  # one channel is bright
    assert [done.config["budget"], done.config["seed"]] == [0.2, 3]
    merged = ViTForImageClassification.from_pretrained(done.folder / "merged")
    assert merged.config.id2label == {0: "blue", 1: "red"}


@pytest.mark.usefixtures("no_picture")
def test_the_same_seed_gives_the_same_adapter(plain_run, tmp_path):
    options, first = plain_run
    again, other = (finish(tmp_path / f"{seed}", "finetune", *options, "--seed", seed).tensors for seed in (0, 6))
    assert all(torch.equal(again[key], tensor) for key, tensor in first.items())
    assert any(not torch.equal(other[key], tensor) for key, tensor in first.items())


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
def test_other_options(tiny_task, tmp_path, options):
    done = finish(tmp_path / "out", "finetune", *tiny_task, "--epochs", 1, "--budget", 0.2, *options)
    side = 48 if "--image-size" in options else 32
    assert done.results["image_shape"] == [3, side, side]
    assert done.results["agreement"]["merged"]["holds"]


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
def test_every_preset_fine_tunes(tiny_task, tmp_path, preset):
    budget = ["--budget", 0.2] if preset == "far" else []  # the tiny model's biases alone exceed its own
    done = finish(tmp_path / "out", "finetune", *tiny_task, "--preset", preset, "--epochs", 1, *budget)
    results, config = done.results, done.config
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
    assert re.search(rf"preset\W+{preset}", done.printed)
    assert f"learning rate {recipe['learning_rate']:g}" in done.printed
    assert results["selection"]["method"] in done.printed


@pytest.mark.usefixtures("no_picture")
def test_options_replace_settings_of_a_preset(tiny_task, tmp_path):
    selection = ["--preset", "gps", "--importance", "magnitude", "--budget", 0.3, "--bias", "none"]
    training = ["--epochs", 2, "--learning-rate", 0.005, "--batch-size", 4]
    done = finish(tmp_path / "out", "finetune", *tiny_task, *selection, *training)
    config, recipe = done.config, done.results["recipe"]
    assert [config["importance"], config["loss"], config["bias"]] == ["magnitude", "task", "none"]
    assert [config["budget"], config["per_neuron"]] == [0.3, None]
    assert [recipe["num_train_epochs"], recipe["learning_rate"]] == [2, 0.005]
    assert recipe["per_device_train_batch_size"] == 4
    assert [recipe["lr_scheduler_type"], recipe["weight_decay"]] == ["cosine", 0]


def test_the_trainer_follows_the_recipe(tiny_task, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "peft_fps.vision.finetuning.train", lambda model, arguments, *_, **options: seen.append(arguments) or 0.0
    )
    finish(tmp_path / "bitfit", "finetune", *tiny_task, "--preset", "bitfit")
    finish(tmp_path / "own", "finetune", *tiny_task, "--budget", 0.2, "--learning-rate", 0.02)
    bitfit, own = seen
    assert [bitfit.learning_rate, bitfit.num_train_epochs, bitfit.per_device_train_batch_size] == [1e-3, 16, 8]
    assert [bitfit.lr_scheduler_type, bitfit.warmup_steps, bitfit.max_grad_norm] == ["constant", 0, 1.0]
    assert [own.learning_rate, own.num_train_epochs, own.per_device_train_batch_size] == [0.02, 30, 32]
    assert [own.lr_scheduler_type, own.warmup_steps, own.weight_decay] == ["cosine", 0.1, 0.0]


@pytest.mark.usefixtures("no_picture")
def test_a_learning_rate_that_is_looked_for(tiny_task, tmp_path, monkeypatch):
    monkeypatch.setattr("peft_fps.vision.rate_trials.TRIED_RATES", (1e-6, 1e-2))
    options = [*tiny_task, "--preset", "fps", "--batch-size", 4, "--epochs", 4, "--centred"]
    options += ["--bias-learning-rate", 5e-3, "--head-learning-rate", 2e-3]
    auto = finish(tmp_path / "auto", "finetune", *options, "--learning-rate", "auto")
    tried = {trial["rate"]: trial["accuracy"] for trial in auto.results["learning_rate_trials"]}
    assert list(tried) == [1e-6, 1e-2]
    taken = 1e-6 if tried[1e-6] >= tried[1e-2] else 1e-2
    assert auto.results["recipe"]["learning_rate"] == auto.config["recipe"]["learning_rate"] == taken
    assert f"taken: {taken:g}, the best" in auto.printed
    found = auto.tensors
    given = finish(tmp_path / "given", "finetune", *options, "--learning-rate", taken).tensors
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
def test_how_biases_head_and_inputs_are_trained(tiny_task, tmp_path, monkeypatch, options, rates, centred):
    seen = []
    monkeypatch.setattr("peft_fps.vision.finetuning.train", lambda *args, callbacks: seen.append(callbacks[-1]) or 0.0)
    finish(tmp_path / "out", "finetune", *tiny_task, "--budget", 0.2, *options)
    assert seen[0].rates == pytest.approx(rates)
    assert seen[0].centred is centred


def test_views_need_a_library(tiny_task, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "kornia.augmentation", None)
    result = run("finetune", *tiny_task, "--preset", "gps", "--output", tmp_path / "out")
    assert "peft-fps[views]" in check_user_error(result)
    assert "linear head" not in result.output  # said before any work


@pytest.mark.usefixtures("no_picture")
def test_images_that_do_not_fit_in_memory(plain_run, tmp_path, monkeypatch):
    options, kept = plain_run
    monkeypatch.setattr("peft_fps.vision.pixels.MEMORY_LIMIT", 0)
    lazy = finish(tmp_path / "lazy", "finetune", *options).tensors
    for key, tensor in kept.items():
        torch.testing.assert_close(lazy[key], tensor)


@pytest.mark.usefixtures("no_picture")
def test_a_merged_model_that_differs_is_an_error(tiny_task, tmp_path, monkeypatch):
    honest = AutoModelForImageClassification.from_pretrained

    def tampered(folder, **options):
        model = honest(folder, **options)
        if Path(folder).name == "merged":
            model.classifier.bias.data[0] += 0.01
        return model

    monkeypatch.setattr("peft_fps.vision.finetuning.AutoModelForImageClassification.from_pretrained", tampered)
    output = tmp_path / "out"
    result = run("finetune", *tiny_task, "--budget", 0.2, "--epochs", 1, "--output", output)
    assert "does not predict what the trained model does" in check_user_error(result)
    agreement = Finished(result.stdout, output).results["agreement"]
    assert agreement["merged"]["largest_difference"] == pytest.approx(0.01, abs=1e-5)
    assert [agreement["merged"]["holds"], agreement["reloaded"]["holds"]] == [False, True]


@pytest.mark.usefixtures("no_picture")
def test_a_full_output_folder_is_left_alone(tiny_task, tmp_path):
    output = tmp_path / "out"
    (output / "adapter").mkdir(parents=True)
    (output / "adapter" / "old.txt").write_text("old")
    (output / "mine.txt").write_text("mine")
    options = [*tiny_task, "--budget", 0.2, "--epochs", 1]
    result = run("finetune", *options, "--output", output)
    assert "not empty" in check_user_error(result)
    assert result.output.strip().count("\n") == 0
    assert (output / "adapter" / "old.txt").exists()
    finish(output, "finetune", *options, "--overwrite")
    assert not (output / "adapter" / "old.txt").exists()
    assert (output / "mine.txt").read_text() == "mine"


def test_a_model_that_would_be_overwritten_is_refused(image_folder, tiny_model, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "out" / "merged")
    result = run("finetune", "--model", model, "--data", image_folder, "--output", tmp_path / "out", "--overwrite")
    assert "lies in the folder to be overwritten" in check_user_error(result)
    assert (model / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "code", "message"),
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
def test_mistakes_end_with_one_clear_message(tmp_path, options, code, message):
    result = run("finetune", *options, "--output", tmp_path / "out", "--epochs", "1", *options)
    assert message in check_user_error(result, code)


@pytest.mark.usefixtures("no_picture")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", 0.0001], "Error: budget"),
        (["--budget", 0.2, "--bias", "none", "--centred"], "--centred lets biases take over what entries shift"),
        (["--budget", 0.2, "--batch-size", 1, "--learning-rate", 1e30], "lower --learning-rate"),
    ],
    ids=["nothing fits in the budget", "centred inputs need biases", "training diverges"],
)
def test_what_fails_on_the_way_ends_with_one_clear_message_and_no_file(tiny_task, tmp_path, options, message):
    result = run("finetune", *tiny_task, "--epochs", 1, *options, "--output", tmp_path / "out")
    assert message in check_user_error(result)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


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
    options = ["--model", model, "--data", data, "--image-size", 64, "--epochs", 1]
    results = finish(tmp_path / "out", "finetune", *options).results
    assert results["classes"] == list("0123456789")
    assert results["images"] == {"train": 40, "validation": 16, "test": 16}
    assert results["image_shape"] == [3, 64, 64]
    assert results["agreement"]["merged"]["different_predictions"] == 0
    assert results["agreement"]["reloaded"]["different_predictions"] == 0
    assert results["selection"]["base_parameters"] == 5_524_416
