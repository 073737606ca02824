"""LoRA around FPS adapters without a `PeftMixedModel`: computing, merging and unmerging, and what is refused."""

import copy
import pickle
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from peft_fps import FPSConfig
from tests.support.helpers import (
    adapted,
    base_bytes,
    bits,
    config,
    dense_change,
    fill,
    images,
    layers_of,
    output,
    tiny_vit,
    unchanged,
    weighted_of,
)


pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
    pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time:UserWarning"),
]

QUERY = "vit.layers.0.attention.q_proj"
COMES = "comes into a model with FPS adapters"


def lora(*targets: str) -> LoraConfig:
    """LoRA that changes something at once."""
    return LoraConfig(r=2, target_modules=list(targets or ("q_proj", "v_proj")), init_lora_weights=False)


def around(fps: PeftModel, *targets: str) -> PeftModel:
    """A LoRA model around the base model of an FPS model; both adapters compute."""
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match=COMES):
        model = get_peft_model(fps.base_model.model, lora(*targets), adapter_name="low")
    return model.eval()


def stacked(*targets: str, **options: Any) -> tuple[PeftModel, PeftModel, nn.Module]:
    """An FPS model, a LoRA model around it, and a plain model with W + ΔW + B A in its weights."""
    fps = adapted(tiny_vit(), modules_to_save=[], **options).eval()
    model = around(fps, *targets)
    plain = tiny_vit().eval()
    with torch.no_grad():
        for layer in weighted_of(model).values():
            module: Any = plain.get_submodule(layer.module_path)
            module.weight += dense_change(layer)
            if "default" in layer.fps_bias:
                module.bias += layer.fps_bias["default"]
        for path, layer in model.base_model.model.named_modules():
            if hasattr(layer, "lora_A"):
                low: Any = layer
                change = low.scaling["low"] * low.lora_B["low"].weight @ low.lora_A["low"].weight
                plain.get_submodule(path).weight.data += change
    return fps, model, plain


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the adapted layers' base weights by path."""
    layers = weighted_of(model).values()
    return {layer.module_path: layer.base_layer.weight.detach().clone() for layer in layers}


def test_merging_both_and_unmerging_in_the_order_of_peft_leaves_the_base() -> None:
    _, model, plain = stacked()
    before, expected = weights(model), output(plain, images())
    torch.testing.assert_close(output(model, images()), expected)
    model.merge_adapter()
    torch.testing.assert_close(output(model, images()), expected)
    with pytest.warns(UserWarning, match="have changed since"):
        model.unmerge_adapter()
    torch.testing.assert_close(output(model, images()), expected)
    for path, weight in weights(model).items():
        torch.testing.assert_close(weight, before[path], rtol=0, atol=1e-6)
        if not path.endswith(("q_proj", "v_proj")):
            assert bits(weight) == bits(before[path])


def test_the_warning_comes_once_for_an_adapter() -> None:
    _, model, _ = stacked()
    model.merge_adapter()
    with pytest.warns(UserWarning, match="This warning comes once") as caught:
        model.unmerge_adapter()
    assert len(caught) == 1
    model.merge_adapter()
    model.unmerge_adapter()


def test_a_disabled_model_with_both_merged_computes_as_the_base() -> None:
    fps, model, _ = stacked()
    base = output(tiny_vit().eval(), images())
    model.merge_adapter()
    for layer in layers_of(model).values():
        layer.enable_adapters(False)  # the LoRA layers stay merged, as in clients that disable one method
    low = tiny_vit().eval()
    for path, layer in model.base_model.model.named_modules():
        if hasattr(layer, "lora_A"):
            layers: Any = layer
            change = layers.scaling["low"] * layers.lora_B["low"].weight @ layers.lora_A["low"].weight
            low.get_submodule(path).weight.data += change.detach()
    torch.testing.assert_close(output(model, images()), output(low, images()))
    assert not torch.allclose(output(model, images()), base, atol=1e-3)


@pytest.mark.parametrize("write", ["an optimizer", "an original"])
def test_what_is_written_while_merged_stays(write: str) -> None:
    model = adapted(tiny_vit(), modules_to_save=[], bias="none").eval()
    layer: Any = layers_of(model)[QUERY]
    before, change = layer.base_layer.weight.detach().clone(), dense_change(layer)
    row, column = (int(places[0]) for places in change.nonzero(as_tuple=True))
    model.merge_adapter()
    new = before[row, column] if write == "an original" else before[row, column] + change[row, column] + 2
    with torch.no_grad():
        layer.base_layer.weight[row, column] = new
    with pytest.warns(UserWarning, match=rf"{QUERY}: 1 of the numbers that merging 'default' wrote"):
        model.unmerge_adapter()
    expected = before.clone()
    expected[row, column] += 0 if write == "an original" else 2
    torch.testing.assert_close(layer.base_layer.weight.data, expected, rtol=0, atol=1e-6)
    others = torch.ones_like(expected, dtype=torch.bool)
    others[row, column] = False
    assert torch.equal(layer.base_layer.weight[others], before[others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cast_while_merged_is_no_change_of_others(dtype: torch.dtype) -> None:
    model = adapted(tiny_vit().to(dtype), modules_to_save=[]).eval()
    before = weights(model)
    model.merge_adapter()
    model.to(torch.float64)
    model.unmerge_adapter()  # warnings are errors
    for path, weight in weights(model).items():
        assert torch.equal(weight, before[path].double())


def test_infinite_and_undefined_numbers_that_were_merged_are_taken_out() -> None:
    model = adapted(tiny_vit(), modules_to_save=[]).eval()
    expected = base_bytes(model)
    layer: Any = layers_of(model)[QUERY]
    layer.structure("default")
    layer.fps_values["default"].data[:2] = torch.tensor([torch.nan, torch.inf])
    layer.merge()
    layer.unmerge()
    assert base_bytes(model) == expected


def test_the_same_name_for_another_method_is_refused() -> None:
    fps = adapted(tiny_vit(), modules_to_save=[])
    with unchanged(fps), pytest.raises(ValueError, match=r"has an FPS adapter 'default', and a LoraConfig"):
        get_peft_model(fps.base_model.model, lora())
    assert isinstance(fps.peft_config["default"], FPSConfig)


def test_the_name_of_another_methods_adapter_is_refused() -> None:
    low = get_peft_model(tiny_vit(), lora())
    with pytest.raises(ValueError, match=r"q_proj: adapter 'default' is one of another method \(peft.tuners.lora"):
        get_peft_model(low.base_model.model, config(target_modules=["fc1"]))
    assert not layers_of(low.base_model.model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_guard_their_names_too(copied: Any) -> None:
    fps = copied(adapted(tiny_vit(), modules_to_save=[]))
    assert type(fps.peft_config) is not dict
    with pytest.raises(ValueError, match="has an FPS adapter 'default'"):
        fps.peft_config["default"] = lora()
    with pytest.raises(ValueError, match="has an FPS adapter 'default'"):
        fps.peft_config.update({"other": config(), "default": lora()})
    assert [*fps.peft_config] == ["default"]


@pytest.mark.parametrize("merge", [True, False])
def test_unloading_beside_another_method_is_refused(merge: bool) -> None:
    fps, model, plain = stacked()
    act = fps.merge_and_unload if merge else fps.unload
    with (
        unchanged(model),
        pytest.raises(ValueError, match=rf"{QUERY}: the model has the adapters \['low'\] of another"),
    ):
        act()
    torch.testing.assert_close(output(model, images()), output(plain, images()))


@pytest.mark.filterwarnings("ignore:(Already following|All) adapters (were|are already) merged:UserWarning")
def test_a_model_in_which_all_is_merged_can_be_unloaded() -> None:
    fps, model, plain = stacked()
    model.merge_adapter()
    unloaded = fps.merge_and_unload()
    torch.testing.assert_close(output(unloaded, images()), output(plain, images()))
    assert not any("lora" in name or "fps" in name for name, _ in unloaded.named_parameters())


def test_fps_over_lora_in_other_modules_is_not_unloaded_alone() -> None:
    torch.manual_seed(1)
    low = get_peft_model(tiny_vit(), lora(), adapter_name="low")
    fps = get_peft_model(low.base_model.model, config(target_modules=["fc1"], modules_to_save=[]))
    fill(fps)
    with unchanged(fps), pytest.raises(ValueError, match=r"the model has the adapters \['low'\] of another method"):
        fps.merge_and_unload()


def test_clients_that_add_adapters_themselves_are_not_warned() -> None:
    model = tiny_vit()
    model.add_adapter(config(modules_to_save=[]), "sparse")
    fill(model, "sparse")
    model.add_adapter(lora(), "low")  # warnings are errors, but for PEFT's
    assert set(model.peft_config) == {"sparse", "low"}


def test_several_heads_cannot_be_active_together() -> None:
    model = adapted(tiny_vit())
    model.add_adapter("other", config())
    active = model.base_model.active_adapters
    with (
        unchanged(model),
        pytest.raises(ValueError, match=r"classifier: the adapters \['default', 'other'\] each train"),
    ):
        model.base_model.set_adapter(["default", "other"])
    assert model.base_model.active_adapters == active
