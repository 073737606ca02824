"""The command as a user runs it."""

import pytest
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageClassification

from tests.cli.saved import check_user_error, finish, run
from tests.reproduce.layouts import write_fgvc, write_vtab


def inputs(task, data, model, size=32):
    return ["--task", task, "--data", data, "--model", model, "--image-size", size]


@pytest.fixture(scope="module")
def vtab_run(tmp_path_factory, tiny_model):
    data = tmp_path_factory.mktemp("data") / "vtab-1k"
    folder = write_vtab(data / "dtd", train=24)
    training = ["--epochs", 4, "--batch-size", 4, "--learning-rate", 0.02, "--per-neuron", 2]
    output = tmp_path_factory.mktemp("runs") / "out"
    return finish(output, "reproduce", "vtab-1k", *inputs("dtd", data, tiny_model), *training), folder


def test_vtab_from_its_own_files(vtab_run):
    done, folder = vtab_run
    results = done.results
    assert results["images"] == {"train": 24, "validation": 6, "test": 8}
    assert results["data"] == str(folder)
    assert f"{results['accuracy']['test']:.2%}" in done.printed
    assert results["accuracy"]["validation"] == max(entry["raw"] for entry in results["epochs"])
    assert results["epochs"][results["kept"]["epoch"] - 1]["raw"] == results["accuracy"]["validation"]
    assert [entry["epoch"] for entry in results["epochs"]] == [1, 2, 3, 4]
    assert results["published"] == {"gps": 75.8, "fps": 75.4}
    differing = {"model", "image_size", "epochs", "batch_size", "per_neuron", "classes", "training_images"}
    assert differing <= set(results["differences"])
    assert results["differences"]["per_neuron"] == {"recipe": 1, "here": 2.0}
    assert "differs: per_neuron" in done.printed
    assert "110 epochs" in " ".join(done.printed.replace("│", " ").split())
    assert sorted(path.name for path in done.folder.iterdir()) == ["adapter", "results.json"]


def test_the_saved_adapter_has_the_test_accuracy(vtab_run, tiny_model):
    done, folder = vtab_run
    base = AutoModelForImageClassification.from_pretrained(
        tiny_model, num_labels=2, ignore_mismatched_sizes=True, dtype=torch.float32
    )
    model = PeftModel.from_pretrained(base, done.folder / "adapter").eval()
    right = 0
    for line in (folder / "test.txt").read_text().splitlines():
        name, label = line.split()
        levels = torch.tensor(list(Image.open(folder / name).convert("RGB").tobytes())).view(32, 32, 3)
        pixels = (levels.permute(2, 0, 1) / 255 - 0.5) / 0.5
        with torch.no_grad():
            right += int(model(pixel_values=pixels[None]).logits.argmax()) == int(label)
    assert done.results["accuracy"]["test"] == right / 8
    assert right >= 6  # red and green images


def test_fgvc_with_augmentation_drop_path_and_average(tmp_path, tiny_model):
    given = inputs("nabirds", write_fgvc(tmp_path / "birds", train=16), tiny_model, size=24)
    training = ["--epochs", 2, "--batch-size", 4, "--per-neuron", 1, "--ema", 0.5, "--limit", 10]
    results = finish(tmp_path / "out", "reproduce", "fgvc", *given, "--method", "gps", *training).results
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
    given = [command, *inputs(task, folder, tiny_model), "--method", method, "--epochs", 1]
    finish(tmp_path / "out", "reproduce", *given)
    assert asked == {"training_mode": training_mode, "shape": (2, 2) if mixed else (2,), "soft": mixed}


def test_training_on_all_keeps_the_last_epoch(tmp_path, tiny_model):
    folder = write_vtab(tmp_path / "svhn")
    for name in ("train800.txt", "val200.txt"):
        (folder / name).unlink()
    given = ["vtab-1k", *inputs("svhn", folder, tiny_model), "--train-on-all", "--epochs", 2]
    results = finish(tmp_path / "out", "reproduce", *given).results
    assert results["images"] == {"train": 18, "test": 8}
    assert results["kept"] == {"epoch": 2, "weights": "raw", "chosen_by": "the last epoch"}
    assert results["epochs"] == []
    assert set(results["accuracy"]) == {"test"}


def test_another_folder_of_images(image_folder, tiny_model, tmp_path):
    given = ["vtab-1k", *inputs("eurosat", image_folder, tiny_model), "--epochs", 1]
    results = finish(tmp_path / "out", "reproduce", *given).results
    assert results["classes"] == ["blue", "red"]
    assert results["differences"]["classes"] == {"recipe": 10, "here": 2}


def test_the_same_seed_gives_the_same_numbers(tmp_path, tiny_model):
    given = ["fgvc", *inputs("cub", write_fgvc(tmp_path / "birds"), tiny_model), "--epochs", 1, "--batch-size", 4]
    first, again, other = (
        finish(tmp_path / f"out{number}", "reproduce", *given, "--seed", seed).results["training_loss"]
        for number, seed in enumerate((1, 1, 2))
    )
    assert first == again != other


@pytest.mark.parametrize("task", ["birds", "cub"])
def test_an_unknown_task_is_answered_with_those_that_there_are(task):
    message = check_user_error(run("reproduce", "vtab-1k", "--task", task, "--data", "x"), code=2)
    assert f"'{task}' is no task of VTAB-1k: caltech101, cifar100," in message.replace("│ ", "")


@pytest.mark.parametrize(
    ("option", "value"), [("--method", "lora"), ("--drop-path", 1), ("--ema", -0.1), ("--precision", "fp8")]
)
def test_a_single_wrong_option(option, value):
    assert option in check_user_error(run("reproduce", "fgvc", "--task", "cub", "--data", "x", option, value), code=2)


def test_what_cannot_be_used_ends_before_anything_is_written(tmp_path, tiny_model):
    folder, output = write_vtab(tmp_path / "dtd"), tmp_path / "out"

    def refusal(data):
        return check_user_error(run("reproduce", "vtab-1k", *inputs("dtd", data, tiny_model), "--output", output))

    (folder / "images/val200/001.png").unlink()
    assert "val200.txt, line 2: there is no image" in refusal(folder)
    (folder / "val200.txt").unlink()
    assert "lacks val200.txt: looked for train800.txt, val200.txt, test.txt" in refusal(folder)
    assert "there is no such file or folder" in refusal(tmp_path / "nowhere")
    assert not output.exists() or not any(output.iterdir())


def test_an_output_folder_that_is_not_empty(tmp_path, tiny_model):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").write_text("mine")
    given = inputs("dtd", write_vtab(tmp_path / "dtd"), tiny_model)
    message = check_user_error(run("reproduce", "vtab-1k", *given, "--output", tmp_path / "out"))
    assert "add --overwrite" in message


@pytest.mark.usefixtures("without_timm")
def test_the_papers_model_without_timm(tmp_path):
    data, output = write_vtab(tmp_path / "x"), tmp_path / "out"
    result = run("reproduce", "vtab-1k", "--task", "dtd", "--data", data, "--output", output)
    assert 'Install it with `pip install "peft-fps[reproduce]"`' in check_user_error(result)
    assert not output.exists()
