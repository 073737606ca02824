"""What a model expects of an adapter file, told without a file."""

import pytest
import torch
from peft import inject_adapter_in_model
from torch import nn

from peft_fps.checkpoint import Expected
from peft_fps.checkpoint.expected_contents import expected_module, whole_keys
from tests.support.helpers import adapted, config, layers_of, tiny_mlp, tiny_vit


def test_a_module_has_the_sizes_of_its_layer_and_the_entries_of_the_file() -> None:
    model = adapted(tiny_mlp(10, 12, 4))
    assert expected_module(layers_of(model)["first"], "default", 7) == Expected(12, 10, 7, bias=True)
    model = adapted(tiny_mlp(10, 12, 4), bias="none")
    assert expected_module(layers_of(model)["last"], "default", 0) == Expected(4, 12, 0, bias=False)


def test_tensors_trained_whole_by_their_names_in_the_base_model() -> None:
    model = adapted(tiny_vit(), "one", modules_to_save=["classifier"])
    expected = {
        "classifier.weight": "base_model.model.classifier.modules_to_save.one.weight",
        "classifier.bias": "base_model.model.classifier.modules_to_save.one.bias",
    }
    assert whole_keys(model, "one") == expected
    assert set(expected.values()) <= model.state_dict().keys()


def test_of_a_model_that_peft_does_not_wrap() -> None:
    model = inject_adapter_in_model(config(modules_to_save=["classifier"]), tiny_vit(), "one")
    assert whole_keys(model, "one")["classifier.bias"] == "classifier.modules_to_save.one.bias"


def test_an_adapter_that_trains_nothing_whole() -> None:
    assert whole_keys(adapted(tiny_vit(), modules_to_save=[]), "default") == {}


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # from within torch.compile
def test_of_a_part_that_was_compiled_since() -> None:
    model = adapted(nn.Sequential(tiny_mlp(4, 4, 4), nn.Linear(4, 2)), target_modules=["first"], modules_to_save=["1"])
    model.base_model.model[0] = torch.compile(model.base_model.model[0], backend="eager")
    inner = adapted(nn.ModuleDict({"body": tiny_mlp(4, 4, 4)}), target_modules=["first"], modules_to_save=["last"])
    inner.base_model.model["body"] = torch.compile(inner.base_model.model["body"], backend="eager")
    assert set(whole_keys(model, "default")) == {"1.weight", "1.bias"}
    keys = whole_keys(inner, "default")
    assert set(keys) == {"body.last.weight", "body.last.bias"}
    assert set(keys.values()) <= inner.state_dict().keys()
