"""Names that an adapter cannot have are refused wherever one is named, before anything changes; others work."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from torch import nn

from tests.support.helpers import adapted, config, fill, normal, through_transformers, tiny_mlp, tiny_vit, unchanged


pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")

ATTRIBUTES = ["half", "type", "train", "training", "forward", "keys", "copy", "state_dict", "_modules"]
DIVIDED = ["a.b", ".", "a."]
PARTS = ["weight", "0", "classifier", "model", "base_model", "fps_values", "base_layer", "_orig_mod"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    adapted(tiny_vit()).save_pretrained(folder)
    return folder


def with_another() -> Any:
    return adapted(tiny_vit(), "first")


Add = Callable[[Any, str, Path], object]
ENTRIES: dict[str, tuple[Callable[[], Any], Add]] = {
    "get_peft_model": (tiny_vit, lambda model, name, _: get_peft_model(model, config(), name)),
    "inject_adapter_in_model": (tiny_vit, lambda model, name, _: inject_adapter_in_model(config(), model, name)),
    "from_pretrained": (tiny_vit, lambda model, name, path: PeftModel.from_pretrained(model, path, name)),
    "transformers add_adapter": (tiny_vit, lambda model, name, _: model.add_adapter(config(), name)),
    "transformers load_adapter": (tiny_vit, lambda model, name, path: model.load_adapter(path, adapter_name=name)),
    "add_adapter": (with_another, lambda model, name, _: model.add_adapter(name, config())),
    "load_adapter": (with_another, lambda model, name, path: model.load_adapter(path, name)),
    "add_weighted_adapter": (with_another, lambda model, name, _: model.add_weighted_adapter(["first"], [1.0], name)),
}


@pytest.mark.parametrize(
    "entry", [pytest.param(e, marks=through_transformers if e == "transformers add_adapter" else ()) for e in ENTRIES]
)
def test_refused_names_change_nothing(entry: str, folder: Path) -> None:
    build, add = ENTRIES[entry]
    model = build()
    for names, reason in ((ATTRIBUTES, "an attribute of torch"), (DIVIDED, "no dot"), (PARTS, "part of a module")):
        for name in names:
            with (
                unchanged(model),
                pytest.raises(ValueError, match=f"adapter's name .*{reason}.* another adapter name"),
            ):
                add(model, name, folder)
    assert list(getattr(model, "peft_config", [])) == (["first"] if build is with_another else [])
    assert not getattr(model, "_hf_peft_config_loaded", False)
    add(model, "fine", folder)


@pytest.mark.filterwarnings("ignore:Adapter name '' should not be contained in the prefix:UserWarning")  # PEFT's own
def test_no_name_and_no_string() -> None:
    model = tiny_vit()
    with unchanged(model), pytest.raises(ValueError, match="name is '', expected one that is not empty"):
        get_peft_model(model, config(), "")
    other: Any = 3
    with unchanged(model), pytest.raises(TypeError, match="name is 3 of type int, expected a string"):
        inject_adapter_in_model(config(), model, other)


@through_transformers
def test_a_refusal_leaves_a_base_model_of_transformers_without_a_trace(tmp_path: Path) -> None:
    model = tiny_vit()
    before = model.state_dict().keys()
    with pytest.raises(ValueError, match="attribute of torch"):
        model.add_adapter(config(), "half")
    model.save_pretrained(tmp_path)  # as a base model, not as adapters
    assert len(load_file(tmp_path / "model.safetensors")) == len(before)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", ["data", "T", "a b", "été", "default", "running_var", "-"])
def test_other_names_work(name: str, tmp_path: Path) -> None:
    model = adapted(tiny_mlp(), name, importance="random", bias="all")
    model.add_adapter("other", config(seed=2))
    fill(model, "other")
    x = normal(3, 10)
    for each in (name, "other"):
        model.set_adapter(each)
        expected = model(x)
        model.save_pretrained(tmp_path / each, selected_adapters=[each])
        held = tmp_path / each if each == "default" else tmp_path / each / each
        loaded = PeftModel.from_pretrained(tiny_mlp(), held, name).eval()
        torch.testing.assert_close(loaded(x), expected, rtol=0, atol=0)


def test_the_name_of_a_buffer_is_refused() -> None:
    base = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    with unchanged(base), pytest.raises(ValueError, match="'running_mean' is also part of a module's path"):
        get_peft_model(base, config(target_modules=["0"], modules_to_save=["1"]), "running_mean")
