import json

import pytest
import torch
from transformers import ViTImageProcessorPil

from peft_fps.reproduce import recipe_model
from peft_fps.reproduce.recipe_model import model_size, normalisation, prepared_model
from peft_fps.vision import timm_names
from peft_fps.vision.timm_names import check_timm, is_timm
from tests.support.helpers import drop_path_rates
from tests.vision.needs import needs_timm


PAPERS = "timm/vit_base_patch16_224.augreg_in21k"


@pytest.mark.parametrize(
    ("config", "expected"),
    [({"pretrained_cfg": {}}, True), ({"model_type": "timm_wrapper"}, True), ({"model_type": "vit"}, False)],
)
def test_a_folder_tells_by_its_config_whether_it_is_timms(tmp_path, config, expected):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert is_timm(str(tmp_path)) == expected


def test_a_name_on_the_hub_tells_by_its_owner():
    assert is_timm(PAPERS)
    assert not is_timm("google/vit-base-patch16-224-in21k")


@pytest.mark.parametrize("error", [ImportError("No module named 'timm'"), RuntimeError("operator nms")])
def test_without_timm_its_models_are_refused_with_the_command_to_install_it(monkeypatch, error):
    def fail(name):
        raise error

    monkeypatch.setattr(timm_names, "import_module", fail)
    with pytest.raises(ImportError, match=r'pip install "peft-fps\[reproduce\]"') as caught:
        check_timm(PAPERS)
    assert str(error) in str(caught.value)
    assert "same build as torch" in str(caught.value)
    check_timm("google/vit-base-patch16-224-in21k")


def test_timms_models_are_let_through_where_it_is_installed(monkeypatch):
    asked = []
    monkeypatch.setattr(timm_names, "import_module", asked.append)
    check_timm(PAPERS)
    assert asked == ["timm"]


@pytest.mark.parametrize(("size", "interpolate"), [(32, False), (48, True)])
def test_images_of_another_size_are_interpolated_to(tiny_model, size, interpolate):
    model, asked = prepared_model(str(tiny_model), ["a", "b", "c"], 0, size, drop_path=0.0)
    assert asked == interpolate
    assert model_size(model) == 32
    options = {"interpolate_pos_encoding": True} if asked else {}
    assert model(pixel_values=torch.zeros(1, 3, size, size), **options).logits.shape == (1, 3)
    assert drop_path_rates(model) == []


def test_drop_path_is_put_in(tiny_model):
    model, _ = prepared_model(str(tiny_model), ["a", "b"], 0, 32, drop_path=0.2)
    assert drop_path_rates(model) == pytest.approx([0.0, 0.2])


def test_a_model_that_takes_one_size_only(tiny_model, monkeypatch):
    monkeypatch.setattr(recipe_model, "interpolates", lambda model: False)
    with pytest.raises(ValueError, match="--image-size is 48, but a ViTForImageClassification .* takes 32 pixels onl"):
        prepared_model(str(tiny_model), ["a", "b"], 0, 48, drop_path=0.0)


@pytest.mark.parametrize(
    ("given", "mean", "std"),
    [
        ({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]),
        ({"do_normalize": False, "image_mean": [0.1, 0.2, 0.3]}, [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]),
    ],
)
def test_normalisation_is_the_models(tmp_path, given, mean, std):
    ViTImageProcessorPil(**given).save_pretrained(tmp_path)
    assert normalisation(str(tmp_path)) == {"mean": mean, "std": std}


def test_normalisation_of_a_timm_model_is_in_its_data_config(monkeypatch):
    class Processor:
        data_config = {"mean": (0.5, 0.25, 0.5), "std": (0.1, 0.2, 0.3)}

    monkeypatch.setattr(recipe_model, "load_processor", lambda name, size: Processor())
    assert normalisation(PAPERS) == {"mean": [0.5, 0.25, 0.5], "std": [0.1, 0.2, 0.3]}


@needs_timm
@pytest.mark.parametrize("size", [32, 64])
def test_a_timm_model_gets_head_size_and_drop_path(tmp_path, size):
    import timm
    from timm.models import save_for_hf

    name = "vit_tiny_patch16_224"
    save_for_hf(timm.create_model(name, num_classes=50), tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("model_args", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    check_timm(str(tmp_path))
    model, interpolate = prepared_model(str(tmp_path), ["a", "b", "c"], 0, size, drop_path=0.1)
    assert not interpolate
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert model(pixel_values=torch.zeros(2, 3, size, size)).logits.shape == (2, 3)
    assert drop_path_rates(model) == pytest.approx([0.1 * block / 11 for block in range(12) for _ in range(2)])
    assert normalisation(str(tmp_path)) == {"mean": [0.5] * 3, "std": [0.5] * 3}
