"""A copy of an adapter under the name `"ref"`, as TRL's trainers make one of the adapter that they go on training."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_fps import FPSConfig
from tests.support.helpers import (
    adapted,
    fill,
    image_batches,
    images,
    layers_of,
    selected_columns,
    tiny_vit,
    unchanged,
    weighted_of,
)


def as_trl_does(model: PeftModel, source: str = "default") -> None:
    """What its trainers do with a model that has an adapter already, but for the name `"default"`."""
    model.add_adapter("ref", model.peft_config[source])
    for name, parameter in model.named_parameters():
        if f".{source}." in name:
            model.get_parameter(name.replace(f".{source}.", ".ref.")).data.copy_(parameter.data)


def outputs(model: PeftModel, adapter: str) -> torch.Tensor:
    active = model.active_adapter
    model.set_adapter(adapter)
    with torch.no_grad():
        result = model.eval()(pixel_values=images()).logits
    model.set_adapter(active)
    return result


def trained(kind: str, folder: Path) -> PeftModel:
    options: dict[str, Any] = {"norms": {"bias": "with_norms"}, "model": {"granularity": "model"}}.get(kind, {})
    model = get_peft_model(tiny_vit(), FPSConfig(per_neuron=2, **options))
    model.calibrate(image_batches(), progress=False)
    fill(model)
    with torch.no_grad():
        model.get_parameter("base_model.model.classifier.modules_to_save.default.weight").add_(1)
    if kind == "scaled":
        model.set_scale("default", 0.5)
    if kind == "loaded":
        model.save_pretrained(folder)
        model = PeftModel.from_pretrained(tiny_vit(), folder, is_trainable=True)
    return model


@pytest.mark.parametrize("kind", ["neuron", "model", "norms", "scaled", "loaded"])
def test_it_is_the_adapter_as_it_was(kind: str, tmp_path: Path) -> None:
    model = trained(kind, tmp_path)
    start, required = outputs(model, "default"), {name: p.requires_grad for name, p in model.named_parameters()}
    as_trl_does(model)
    assert torch.equal(outputs(model, "ref"), start)
    for layer in weighted_of(model).values():
        assert selected_columns(layer, "ref") == selected_columns(layer)
    assert model.active_adapter == "default"
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == required.get(name, False), name

    fill(model, seed=9)  # it shares no memory
    assert torch.equal(outputs(model, "ref"), start)
    assert not torch.allclose(outputs(model, "default"), start, atol=1e-3)
    report = model.selection_report("ref")
    assert report.trained == model.selection_report("default").trained
    assert report.method == model.selection_report("default").method


def test_both_are_saved_and_loaded(tmp_path: Path) -> None:
    model = trained("model", tmp_path)
    as_trl_does(model)
    fill(model, seed=9)
    model.save_pretrained(tmp_path / "both")
    for name, folder in (("default", tmp_path / "both"), ("ref", tmp_path / "both" / "ref")):
        loaded = PeftModel.from_pretrained(tiny_vit(), folder)
        assert torch.equal(outputs(loaded, "default"), outputs(model, name))


def test_of_a_new_adapter_it_computes_as_the_base_model_after_calibration_too() -> None:
    model = get_peft_model(tiny_vit(), FPSConfig(per_neuron=2, modules_to_save=[]))
    as_trl_does(model)
    model.calibrate(image_batches(), progress=False)
    fill(model)
    torch.testing.assert_close(outputs(model, "ref"), tiny_vit()(pixel_values=images()).logits.detach())


@pytest.mark.parametrize("name", ["other", "ref"])
def test_one_config_for_several_adapters_gives_each_a_new_start(name: str) -> None:
    config = FPSConfig(per_neuron=2, importance="magnitude")
    model = adapted(tiny_vit(), importance="magnitude", modules_to_save=[])
    model.add_adapter("first", config)
    fill(model, "first")
    model.add_adapter(name, config if name == "other" else deepcopy(config))
    assert not any(layer.fps_values[name].any() for layer in layers_of(model).values())
    assert model.peft_config[name].per_neuron == 2


def test_the_original_keeps_its_config() -> None:
    model = adapted(tiny_vit())
    config = model.peft_config["default"]
    as_trl_does(model)
    assert model.peft_config["default"] is config
    assert model.peft_config["ref"] is not config
    assert config.record is None


def test_a_damaged_adapter_is_not_copied() -> None:
    model = adapted(tiny_vit())
    next(iter(layers_of(model).values())).fps_values["default"].data[0] = torch.nan
    with unchanged(model), pytest.raises(ValueError, match=r"training diverged.*file is damaged"):
        model.add_adapter("ref", model.peft_config["default"])
    assert "ref" not in model.peft_config
