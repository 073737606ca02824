"""Tiny models of timm by name; without timm nothing here can run."""

import importlib
import json
import logging

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification

from peft_fps.vision.classifiers import classifier, load_model, load_processor
from peft_fps.vision.locations import check_locations
from peft_fps.vision.pixels import two_views
from peft_fps.vision.timm_models import weights_of
from peft_fps.vision.timm_names import check_timm_name
from tests.cli.saved import check_user_error, finish, run
from tests.vision.needs import needs_timm


pytestmark = needs_timm

CLASSES = ["red", "green", "blue"]
CONVOLUTIONS, TRANSFORMER = "test_resnet", "test_vit"
"""timm's own tiny models for tests: 0.5 and 0.4 million parameters, 160 px."""


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """The Hub cannot be reached and nothing is in the cache, which is told at once."""

    def fail(*args, **options):
        raise FileNotFoundError("offline")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", fail)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_url", fail)


def timm_model(name, **options):
    return importlib.import_module("timm").create_model(name, **options)


def write(model, file):
    """Write weights as timm does; gives the state that is expected of the backbone."""
    state = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    save_file(state, file) if file.suffix == ".safetensors" else torch.save(state, file)
    return state


def is_head(key):
    return key.startswith(("fc.", "head."))


@pytest.mark.parametrize("name", [CONVOLUTIONS, TRANSFORMER])
@pytest.mark.parametrize("number", [0, 3, 50])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_of_a_file_whatever_its_head(tmp_path, name, number, suffix, caplog):
    file = tmp_path / f"weights{suffix}"
    expected = write(timm_model(name, num_classes=number), file)
    model = load_model(f"timm:{name}@{file}", CLASSES, seed=0)
    state = model.timm_model.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in expected.items() if not is_head(key))
    assert {key for key in state if key not in expected} <= {key for key in state if is_head(key)}
    assert classifier(model).weight.shape[0] == 3
    assert model.config.id2label == dict(enumerate(CLASSES))
    assert weights_of(model) == f"from {file}"
    assert not caplog.records


def test_the_file_of_a_saved_wrapper_is_one_too(tmp_path):
    first = load_model(f"timm:{TRANSFORMER}", CLASSES, seed=0)
    first.save_pretrained(tmp_path)
    again = load_model(f"timm:{TRANSFORMER}@{tmp_path}/model.safetensors", ["no", "yes"], seed=1, image_size=64)
    state = again.timm_model.state_dict()
    assert torch.equal(state["blocks.0.attn.qkv.weight"], first.timm_model.blocks[0].attn.qkv.weight)


def test_an_origin_is_that_of_the_weights(tmp_path, monkeypatch):
    file = tmp_path / "weights.pth"
    torch.save(timm_model(CONVOLUTIONS).state_dict(), file)
    for name in (f"timm:{CONVOLUTIONS}", f"timm:{CONVOLUTIONS}@{file}"):
        described = load_model(name, CLASSES, seed=0).config.pretrained_cfg
        assert not {"tag", "hf_hub_id", "url", "file", "state_dict"} & described.keys()
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *a, **o: torch.load(file))
    model = load_model(f"timm:{CONVOLUTIONS}", CLASSES, seed=0)
    assert weights_of(model) == "r160_in1k, published by timm"
    assert model.config.pretrained_cfg["tag"] == "r160_in1k"
    assert torch.equal(model.timm_model.layer1[0].conv1.weight, torch.load(file)["layer1.0.conv1.weight"])


def test_without_weights_they_are_random_by_the_seed_and_that_is_said(caplog):
    before = torch.get_rng_state()
    first, again, other = (load_model(f"timm:{CONVOLUTIONS}", CLASSES, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    key = "timm_model.layer1.0.conv1.weight"
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in first.state_dict().items())
    assert not torch.equal(first.state_dict()[key], other.state_dict()[key])
    assert "random weights: those that timm publishes are not in the local cache" in weights_of(first)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 3
    assert "timm:test_resnet has random weights" in caplog.text


def test_another_size_is_what_timm_makes_of_the_weights(tmp_path):
    file = tmp_path / "weights.pth"
    torch.save(timm_model(TRANSFORMER).state_dict(), file)
    model = load_model(f"timm:{TRANSFORMER}@{file}", CLASSES, 0, image_size=64)
    reference = timm_model(TRANSFORMER, pretrained=True, pretrained_cfg_overlay={"file": str(file)}, img_size=64)
    assert torch.equal(model.timm_model.pos_embed, reference.pos_embed)
    pixels = torch.randn(2, 3, 64, 64)
    reference.eval()
    torch.testing.assert_close(model.timm_model.forward_features(pixels), reference.forward_features(pixels))
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "saved").eval()
    torch.testing.assert_close(loaded(pixel_values=pixels).logits, model(pixel_values=pixels).logits)
    assert AutoImageProcessor.from_pretrained(tmp_path / "saved").data_config["input_size"] == (3, 64, 64)


def test_the_processor_is_as_timm_says():
    data = importlib.import_module("timm").data
    for size, own in ((None, 160), (64, 64)):
        processor = load_processor(f"timm:{CONVOLUTIONS}", size)
        expected = data.resolve_model_data_config(timm_model(CONVOLUTIONS)) | {"input_size": (3, own, own)}
        assert processor.data_config == expected
        pixels = processor(torch.zeros(3, 70, 90), return_tensors="pt")["pixel_values"]
        assert pixels.shape == (1, 3, own, own)


def test_two_views_of_what_timm_has_normalised():
    pytest.importorskip("kornia")
    processor = load_processor(f"timm:{TRANSFORMER}", 32)
    white = processor(torch.ones(1, 3, 40, 40), return_tensors="pt")["pixel_values"]
    assert white.max() > 1  # normalised, which the views undo or else refuse
    assert two_views(processor)(white).shape == (2, 3, 32, 32)


@pytest.mark.parametrize("name", [CONVOLUTIONS, TRANSFORMER])
def test_a_timm_model_in_a_folder_is_not_fed_images_of_another_size_unnoticed(tmp_path, name, caplog):
    load_model(f"timm:{name}", CLASSES, 0).save_pretrained(tmp_path)
    assert load_processor(str(tmp_path), 64).data_config["input_size"] == (3, 64, 64)
    if name == TRANSFORMER:
        with pytest.raises(ValueError, match="--image-size is 64, but .* takes 160 pixels only.*timm:test_vit@FILE"):
            load_model(str(tmp_path), CLASSES, 0, image_size=64)
        return
    model = load_model(str(tmp_path), CLASSES, 0, image_size=64)
    model.save_pretrained(tmp_path / "saved")
    assert AutoImageProcessor.from_pretrained(tmp_path / "saved").data_config["input_size"] == (3, 64, 64)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:resnet81", r"timm has no model 'resnet81'. Did you mean .*resnet18"),
        ("timm:qqqqqqqq", r"timm has no model 'qqqqqqqq'. timm.list_models\(\) lists them"),
        ("timm:test_vit.none", r"timm has no weights 'none' of test_vit, expected one of .*r160_in1k"),
    ],
)
def test_names_that_timm_does_not_know(name, message):
    with pytest.raises(ValueError, match=message):
        check_timm_name("--model", name)


def test_weights_of_another_model_are_refused(tmp_path):
    write(timm_model(CONVOLUTIONS), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="timm:test_vit@.*could not be built.*Missing key"):
        load_model(f"timm:{TRANSFORMER}@{tmp_path}/weights.pth", CLASSES, 0)


def test_incomplete_weights_are_refused(tmp_path):
    state = timm_model(TRANSFORMER, num_classes=50).state_dict()
    del state["blocks.0.mlp.fc1.weight"]
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"could not be built.*blocks\.0\.mlp\.fc1\.weight"):
        load_model(f"timm:{TRANSFORMER}@{tmp_path}/weights.pth", CLASSES, 0)


def test_a_size_without_a_patch_is_refused():
    with pytest.raises(ValueError, match="--image-size is 3, which is smaller than one patch of 'timm:test_vit'"):
        load_model(f"timm:{TRANSFORMER}", CLASSES, 0, image_size=3)


def test_what_timm_refuses_is_told_with_the_size(monkeypatch):
    def fail(name, **options):
        raise AssertionError("does not divide")

    monkeypatch.setattr("timm.models.create_model", fail)
    with pytest.raises(ValueError, match="timm:test_vit'.*could not be built with images of 40 pixels: does not div"):
        load_model(f"timm:{TRANSFORMER}", CLASSES, 0, image_size=40)


# the last norms of a random ResNet's branches are zero, so that their convolutions get gradients of zeros
@pytest.mark.filterwarnings("ignore:.* got no gradient in .*, or only zeros:UserWarning")
@pytest.mark.parametrize("name", [CONVOLUTIONS, TRANSFORMER])
def test_the_whole_job_and_what_it_leaves(image_folder, tmp_path, name):
    output = tmp_path / "out"
    task = ["--model", f"timm:{name}", "--data", image_folder, "--image-size", 32]
    done = finish(output, "finetune", *task, "--epochs", 1, "--budget", 0.05, "--batch-size", 8)
    assert "random weights" in done.printed
    assert done.results["weights"].startswith("random weights")
    assert done.results["image_shape"] == [3, 32, 32]
    assert done.results["agreement"]["merged"]["holds"]
    assert done.results["agreement"]["reloaded"]["holds"]
    assert done.config["base_model_name_or_path"] == str((output / "base").resolve())
    finish(tmp_path / "merged", "merge", output / "adapter")
    pixels, folders = torch.randn(2, 3, 32, 32), (output / "merged", tmp_path / "merged")
    models = [AutoModelForImageClassification.from_pretrained(folder) for folder in folders]
    first, second = (model.eval()(pixel_values=pixels).logits for model in models)
    torch.testing.assert_close(first, second)
    assert models[0].config.id2label == {0: "blue", 1: "red"}


def test_a_file_in_the_folder_to_be_overwritten(tmp_path):
    (tmp_path / "base.pth").touch()
    with pytest.raises(ValueError, match="lies in the folder to be overwritten"):
        check_locations(f"timm:{TRANSFORMER}@{tmp_path}/base.pth", None, tmp_path, overwrite=True)


def test_selection_of_a_model_by_name(image_folder, tmp_path):
    arguments = ["--model", f"timm:{TRANSFORMER}", "--data", image_folder, "--image-size", 32, "--budget", 0.05]
    folder = finish(tmp_path / "out", "select", *arguments).folder
    report = json.loads((folder / "report.json").read_text())
    assert report["model"] == f"timm:{TRANSFORMER}"
    assert report["weights"].startswith("random weights")


def test_an_unknown_name_ends_the_command_before_anything_is_written(image_folder, tmp_path):
    for command in ("finetune", "select"):
        result = run(command, "--model", "timm:resnet81", "--data", image_folder, "--output", tmp_path / "out")
        assert "Did you mean" in check_user_error(result)
        assert not (tmp_path / "out").exists()
