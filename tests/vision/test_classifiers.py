import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessorPil, ViTForImageClassification

from peft_fps.vision.classifiers import classifier, interpolates, load_model, load_processor


CLASSES = ["red", "green", "blue"]


def test_backbone_is_loaded_in_float32_and_the_head_is_new(tiny_model):
    stored = ViTForImageClassification.from_pretrained(tiny_model, dtype=torch.float16).state_dict()
    assert stored["classifier.weight"].dtype == torch.float16
    model = load_model(str(tiny_model), ["no", "yes"], seed=0)
    state = model.state_dict()
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    for name, tensor in stored.items():
        assert torch.equal(state[name], tensor.float()) != name.startswith("classifier.weight"), name
    assert state["classifier.weight"].std() == pytest.approx(0.02, rel=0.3)


def test_head_has_the_classes_and_follows_the_seed(tiny_model):
    model, same, other = (load_model(str(tiny_model), CLASSES, seed) for seed in (0, 0, 1))
    assert model.config.id2label == dict(enumerate(CLASSES))
    assert model.config.label2id == {"red": 0, "green": 1, "blue": 2}
    assert classifier(model) is model.classifier
    assert model.classifier.weight.shape == (3, 32)
    assert not model.classifier.bias.any()
    assert torch.equal(model.classifier.weight, same.classifier.weight)
    assert not torch.equal(model.classifier.weight, other.classifier.weight)


def test_only_reports_about_the_head_are_dropped(tiny_model, tmp_path, caplog):
    transformers_log = logging.getLogger("transformers")
    transformers_log.addHandler(caplog.handler)
    try:
        load_model(str(tiny_model), CLASSES, seed=0)
        assert not caplog.records
        ViTForImageClassification.from_pretrained(tiny_model, num_labels=3, ignore_mismatched_sizes=True)
        assert "LOAD REPORT" in caplog.text
    finally:
        transformers_log.removeHandler(caplog.handler)


def test_incomplete_backbone_is_refused(tiny_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["vit.layernorm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weights of a ViTForImageClassification.*vit.layernorm.weight"):
        load_model(str(folder), CLASSES, seed=0)


def test_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--model is .*could not be loaded"):
        load_model(str(tmp_path), CLASSES, seed=0)


def test_image_size(tiny_model):
    processor = load_processor(str(tiny_model), 48)
    pixels = processor(torch.zeros(3, 20, 30, dtype=torch.uint8), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 48, 48)
    assert load_processor(str(tiny_model), None).size["height"] == 32
    assert interpolates(load_model(str(tiny_model), CLASSES, seed=0))


def test_image_size_of_a_processor_that_crops(tmp_path):
    CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 56, "width": 56}).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["crop_size"]["height"] == 56
    processor = load_processor(str(tmp_path), 28)
    assert processor.size["shortest_edge"] == 32
    pixels = processor(torch.zeros(3, 50, 70, dtype=torch.uint8), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 28, 28)
