"""FPS and LoRA adapters in one `PeftMixedModel`, against a plain model with W + ΔW + s B A as its weights."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    LoHaConfig,
    LoraConfig,
    PeftMixedModel,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from peft.tuners.mixed import MixedModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import peft_fps
from peft_fps import FPSConfig, FPSMixedModel
from peft_fps.layers.entry_layer import EntryLayer
from tests.support.helpers import (
    adapted,
    bits,
    config,
    dense_change,
    entry_places,
    fill,
    image_batches,
    images,
    normal,
    selected_columns,
    tiny_conv,
    tiny_gpt2,
    tiny_vit,
    tokens,
    unchanged,
    with_fields,
)


pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # read by every PeftMixedModel
    pytest.mark.filterwarnings("ignore:(Already following|All) adapters (were|are already) merged:UserWarning"),
]

LABELS = torch.tensor([0, 1, 2, 3])
QUERY, KEY = (f"vit.layers.0.attention.{part}_proj" for part in "qk")
BOTH = ["low", "sparse"]
ORDERS = pytest.mark.parametrize("names", [BOTH, BOTH[::-1]], ids=" then ".join)


def lora(**options: Any) -> LoraConfig:
    """LoRA that changes something at once, on queries and values unless told otherwise."""
    return LoraConfig(
        **{"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False} | options
    )


def mixed(names: list[str] = BOTH, base: nn.Module | None = None, **options: Any) -> PeftMixedModel:
    """A tiny ViT, unless another base is given, with the adapters "low" and "sparse", added in the order of names."""
    configs = {"low": lora(), "sparse": config()} | options
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = get_peft_model(tiny_vit() if base is None else base, configs[names[0]], names[0], mixed=True)
        for name in names[1:]:
            model.add_adapter(name, configs[name])
    if "sparse" in names:
        fill(model, "sparse", scale=0.1)
        for name, parameter in model.named_parameters():
            if ".modules_to_save.sparse." in name:
                parameter.data += normal(*parameter.shape, seed=3)
    model.set_adapter(names)
    return model.eval()


def low_rank(layer: Any, name: str = "low") -> Tensor:
    """s B A in the shape of the base layer's weight; embeddings and `Conv1D` store the transpose."""
    if name in layer.lora_embedding_A:
        first, second = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    else:
        first, second = layer.lora_A[name].weight, layer.lora_B[name].weight
    change = layer.scaling[name] * second.flatten(1).double() @ first.flatten(1).double()
    base = layer.get_base_layer()
    return change.T if isinstance(base, (Conv1D, nn.Embedding)) else change.reshape(base.weight.shape)


def reference(model: PeftMixedModel, active: list[str], base: nn.Module | None = None) -> nn.Module:
    """A plain model with the active adapters' changes in its weights, and the head that "sparse" trains whole."""
    plain = tiny_vit() if base is None else base
    inner: nn.Module = model.base_model.model
    with torch.no_grad():
        for path, layer in inner.named_modules():
            if isinstance(layer, LoraLayer) and "low" in active:
                weight = plain.get_submodule(path).weight
                weight += low_rank(layer).to(weight.dtype)
            if isinstance(layer, EntryLayer) and "sparse" in active:
                module = plain.get_submodule(layer.module_path)
                module.weight += dense_change(layer, "sparse").to(module.weight.dtype)
                if "sparse" in layer.fps_bias:
                    module.bias += layer.fps_bias["sparse"]
    if "sparse" in active and hasattr(inner, "classifier"):
        plain.classifier = copy.deepcopy(inner.classifier.modules_to_save["sparse"])
    return plain


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(pixel_values=images()).logits


def base_bits(model: PeftMixedModel) -> dict[str, bytes]:
    """The bytes of the base model's weights by name, read through whatever lies over them."""
    found = model.base_model.model.named_parameters()
    return {
        name.replace(".base_layer", ""): bits(parameter)
        for name, parameter in found
        if not any(part in name for part in ("lora_", "fps_", "modules_to_save"))
    }


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# --- added, switched, trained ---------------------------------------------------------------------------------------


@ORDERS
def test_each_both_and_none_compute_with_the_dense_weights(names: list[str]) -> None:
    model = mixed(names)
    assert type(model.base_model) is FPSMixedModel
    for active in (BOTH, ["low"], ["sparse"], BOTH[::-1]):
        model.set_adapter(active)
        close(logits(model), logits(reference(model, active)))
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert {name for name in trained if "sparse" not in name and "low" not in name} == set()
        assert {kind for kind in BOTH if any(f".{kind}" in name for name in trained)} == set(active)
    with model.disable_adapter():
        assert bits(logits(model)) == bits(logits(tiny_vit()))
    close(logits(model), logits(reference(model, BOTH)))


def test_gradients_are_those_of_the_dense_weights() -> None:
    model = mixed()
    plain = reference(model, BOTH)
    for one in (model, plain):
        one(pixel_values=images(), labels=LABELS).loss.backward()
    for path, layer in model.base_model.model.named_modules():
        if isinstance(layer, LoraLayer):
            dense = plain.get_submodule(path).weight.grad * layer.scaling["low"]
            close(layer.lora_A["low"].weight.grad, layer.lora_B["low"].weight.T @ dense)
            close(layer.lora_B["low"].weight.grad, dense @ layer.lora_A["low"].weight.T)
        if isinstance(layer, EntryLayer):
            module = plain.get_submodule(layer.module_path)
            places = entry_places(layer.base_layer, selected_columns(layer, "sparse"))
            close(layer.fps_values["sparse"].grad, module.weight.grad.flatten()[places])
            if "sparse" in layer.fps_bias:
                close(layer.fps_bias["sparse"].grad, module.bias.grad)


def test_training_moves_both_and_no_base_weight_and_switching_keeps_the_optimizer() -> None:
    model, before = mixed(), base_bits(mixed())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    start = {name: bits(p) for name, p in trained.items()}
    for active in (BOTH, ["low"], BOTH):
        model.set_adapter(active)
        optimizer.zero_grad()
        model(pixel_values=images(), labels=LABELS).loss.backward()
        optimizer.step()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(trained)
    assert all(model.get_parameter(name) is p and bits(p) != start[name] for name, p in trained.items())
    assert base_bits(model) == before
    close(logits(model), logits(reference(model, BOTH)))


@pytest.mark.parametrize(
    ("build", "targets", "call"),
    [
        (tiny_gpt2, ["c_attn", "wpe"], lambda model: model(input_ids=tokens()).logits),
        (tiny_conv, ["stem", "head"], lambda model: model(images())),
    ],
    ids=["Conv1D and embedding", "convolution"],
)
def test_other_kinds_of_layers(build: Any, targets: list[str], call: Any) -> None:
    low = lora(target_modules=targets, fan_in_fan_out=build is tiny_gpt2)
    model = mixed(["sparse", "low"], build(), low=low, sparse=config(target_modules=r".*(c_attn|c_fc|wpe|stem)|head"))
    with torch.no_grad():
        expected = call(reference(model, BOTH, build()))
        close(call(model), expected)
        model.merge_adapter()
        close(call(model), expected)
        model.unmerge_adapter()
        close(call(model.merge_and_unload()), expected)


def test_adding_leaves_what_is_trained_and_active() -> None:
    model = mixed()
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    before = logits(model)
    model.add_adapter("second", config(importance="random"))
    model.add_adapter("lower", lora(target_modules=["fc1"]))
    assert {id(p) for p in model.parameters() if p.requires_grad} == trained
    assert model.active_adapters == BOTH
    assert bits(logits(model)) == bits(before)
    with pytest.raises(ValueError, match=r"classifier: the adapters \['sparse', 'second'\] each train"):
        model.set_adapter([*BOTH, "second"])
    assert model.active_adapters == BOTH
    model.set_adapter(["second", "low", "lower"])


# --- calibration ----------------------------------------------------------------------------------------------------


def naive_columns(plain: nn.Module, path: str, count: int) -> list[list[int]]:
    """The best columns of each neuron by |w| · mean |x|, with the base model's weights and a plain model's inputs."""
    seen: list[Tensor] = []
    plain.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in image_batches():
            plain(**batch)
    scores = tiny_vit().get_submodule(path).weight.abs() * torch.cat(seen).abs().mean(0)
    return [sorted(row) for row in scores.topk(count).indices.tolist()]


@pytest.mark.parametrize("active", [["sparse"], BOTH], ids=" and ".join)
def test_calibration_sees_what_active_lora_adapters_compute(active: list[str]) -> None:
    model = mixed(sparse=FPSConfig(per_neuron=3), low=lora(lora_alpha=40))
    model.set_adapter(active)
    report = model.calibrate(image_batches(), progress=False, discard_values=True)
    assert report.layers == model.selection_report("sparse").layers
    inputs = reference(model, [name for name in active if name == "low"])
    for path in ("vit.layers.1.mlp.fc1", "vit.layers.1.attention.q_proj"):
        layer = next(each for each in model.modules() if getattr(each, "module_path", "") == path)
        assert selected_columns(layer, "sparse") == naive_columns(inputs, path, 3)
    model.calibrate(image_batches(), progress=False)
    assert peft_fps.selection_report(model, "sparse").layers == report.layers


# --- merging --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "safe"),
    [
        ([None], False),
        ([BOTH], True),
        ([BOTH[::-1]], True),
        ([["low"]], False),
        ([["sparse"]], False),
        ([["sparse"], ["low"]], False),
        ([["low"], ["sparse"]], False),
        ([["second", "low", "third"]], True),
    ],
    ids=str,
)
def test_merging_changes_no_output_and_unmerging_restores_every_bit(steps: list[Any], safe: bool) -> None:
    model = mixed()
    active = BOTH
    if "second" in (steps[0] or ()):
        for name in ("second", "third"):
            model.add_adapter(name, config(importance="random", modules_to_save=[], seed=len(name)))
            fill(model, name)
        active = ["second", "low", "third"]
        model.set_adapter(active)
    expected, before = logits(model), base_bits(model)
    for names in steps:
        model.merge_adapter(names, safe_merge=safe)
        close(logits(model), expected)
    assert base_bits(model) != before
    model.unmerge_adapter()
    assert base_bits(model) == before
    assert bits(logits(model)) == bits(expected)


@pytest.mark.parametrize("merged", [BOTH, ["low"], ["sparse"]], ids=" and ".join)
def test_a_merged_model_is_disabled_and_switched_bit_for_bit(merged: list[str]) -> None:
    model, plain = mixed(), logits(tiny_vit())
    before = base_bits(model)
    model.merge_adapter(merged)
    with model.disable_adapter():
        assert bits(logits(model)) == bits(plain)
    close(logits(model), logits(reference(model, BOTH)))
    if model.base_model._merged():  # FPS adapters stay merged while they are off
        model.unmerge_adapter()
    assert base_bits(model) == before
    model.merge_adapter(merged)
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapter("sparse")
    assert base_bits(model) == before
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()


@pytest.mark.parametrize("broken", BOTH)
@ORDERS
def test_a_merge_that_fails_leaves_everything_as_it_was(names: list[str], broken: str) -> None:
    model = mixed()
    model.merge_adapter(["sparse" if broken == "low" else "low"])
    before, merged = base_bits(model), model.base_model._merged()
    next(p for name, p in model.named_parameters() if f".{broken}" in name and "layers.1" in name).data[0] = torch.inf
    with unchanged(model), pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(names, safe_merge=True)
    assert (base_bits(model), model.base_model._merged()) == (before, merged)
    model.unmerge_adapter()
    assert base_bits(model) == base_bits(mixed())


@pytest.mark.parametrize("names", [None, ["low"], ["sparse"]], ids=str)
def test_unloading_gives_the_plain_model(names: list[str] | None) -> None:
    model = mixed()
    plain = reference(model, names or BOTH)
    plain.classifier = copy.deepcopy(reference(model, ["sparse"]).classifier)  # the active copy, whatever is merged
    merged = copy.deepcopy(model).merge_and_unload(adapter_names=names)
    assert [*merged.state_dict()] == [*tiny_vit().state_dict()]
    close(logits(merged), logits(plain))
    model.merge_adapter()
    bare = model.unload()
    assert bits(bare.vit.layers[0].attention.q_proj.weight) == bits(tiny_vit().vit.layers[0].attention.q_proj.weight)
    assert not hasattr(bare, "peft_config")


@pytest.mark.parametrize("name", BOTH)
def test_deleting_one_leaves_the_other(name: str) -> None:
    model, (other,) = mixed(), [each for each in BOTH if each != name]
    model.merge_adapter([name])
    with pytest.raises(ValueError, match="while they are merged"):
        model.delete_adapter(name)
    model.unmerge_adapter()
    model.delete_adapter(name)
    assert (list(model.peft_config), model.active_adapters) == ([other], [other])
    assert not [key for key in model.state_dict() if f".{name}" in key]
    close(logits(model), logits(reference(model, [other])))
    model.add_adapter(name, lora() if name == "low" else config())
    model.set_adapter(name)
    with pytest.warns(UserWarning, match=f"Setting active adapter to {other}"):
        model.delete_adapter(name)
    close(logits(model), logits(reference(model, [other])))


# --- files ----------------------------------------------------------------------------------------------------------


def load(names: list[str], folders: dict[str, Path], base: nn.Module | None = None) -> PeftMixedModel:
    first, second = names
    model = PeftMixedModel.from_pretrained(tiny_vit() if base is None else base, folders[first], first)
    model.load_adapter(folders[second], second)
    model.set_adapter(names)
    return model.eval()


@ORDERS
def test_files_are_those_of_each_method_alone_and_load_in_any_order(names: list[str], tmp_path: Path) -> None:
    model = mixed(names)
    with pytest.raises(NotImplementedError):
        model.save_pretrained(tmp_path)
    peft_fps.save_adapter(model, tmp_path / "both")
    folders = {name: tmp_path / "both" / name for name in BOTH}
    get_peft_model(tiny_vit(), lora()).save_pretrained(tmp_path / "low")
    adapted(tiny_vit()).save_pretrained(tmp_path / "sparse")
    for name in BOTH:
        alone = tmp_path / name / "adapter_model.safetensors"
        assert load_file(folders[name] / alone.name).keys() == load_file(alone).keys()
        single = PeftModel.from_pretrained(tiny_vit(), folders[name]).eval()
        close(logits(single), logits(reference(model, [name])))
    for order in (BOTH, BOTH[::-1]):
        loaded = load(order, folders)
        assert bits(logits(loaded)) == bits(logits(model))
        peft_fps.save_adapter(loaded, tmp_path / "again")
        for name in BOTH:
            assert (tmp_path / "again" / name / alone.name).read_bytes() == (folders[name] / alone.name).read_bytes()
    fill(loaded, "sparse", seed=9)
    peft_fps.hotswap_adapter(loaded, str(folders["sparse"]), "sparse")
    assert bits(logits(loaded)) == bits(logits(model))


@ORDERS
def test_state_dicts_of_each_load_into_a_fresh_model(names: list[str]) -> None:
    model, fresh = mixed(names), mixed(names[::-1])
    for parameter in fresh.parameters():
        parameter.data.mul_(0.5 if parameter.requires_grad else 1)
    for name in BOTH:
        set_peft_model_state_dict(fresh, get_peft_model_state_dict(model, adapter_name=name), adapter_name=name)
    assert bits(logits(fresh)) == bits(logits(model))


def test_another_base_is_refused_and_leaves_the_lora_adapter(tmp_path: Path) -> None:
    peft_fps.save_adapter(mixed(), tmp_path)
    other = tiny_vit()
    other.vit.layers[0].attention.k_proj.weight.data += 1
    model = mixed(["low"], other)
    with unchanged(model), pytest.raises(ValueError, match="fingerprint"):
        model.load_adapter(tmp_path / "sparse", "sparse")
    assert type(model.base_model) is MixedModel
    file, saved = (tmp_path / "sparse" / name for name in ("adapter_model.safetensors", "adapter_config.json"))
    tensors = load_file(file)
    next(tensor for key, tensor in tensors.items() if key.endswith("fps_values"))[0] = torch.nan
    save_file(tensors, file)
    saved.write_text(json.dumps(with_fields(json.loads(saved.read_text()), tensors_sha256=None)))
    model = mixed(["low"])
    with unchanged(model), pytest.raises(ValueError, match="NaN"):  # found when the adapter is in the model already
        model.load_adapter(tmp_path / "sparse", "sparse")
    assert model.base_model.targeted_module_names == mixed(["low"]).base_model.targeted_module_names


# --- refused, and left alone ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, r"'low' is a LoraConfig with use_dora=True, expected one that only adds"),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights='pissa'"),
        ({"bias": "all"}, r"bias='all'"),
        ({"target_parameters": ["fc1.weight"]}, r"target_parameters=\['fc1.weight'\]"),
    ],
)
@pytest.mark.parametrize("first", [False, True], ids=["LoRA second", "LoRA first"])
def test_lora_that_does_more_than_add_is_refused(options: dict[str, Any], message: str, first: bool) -> None:
    model = mixed(["low"], low=lora(**options)) if first else mixed(["sparse"])
    with unchanged(model), pytest.raises(ValueError, match=message):
        model.add_adapter(*(("sparse", config()) if first else ("low", lora(**options))))
    assert type(model.base_model) is (MixedModel if first else FPSMixedModel)


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["sparse", "low"], {"low": lora(target_modules="all-linear")}, r"is trained whole.*'classifier\.\*'"),
        (["sparse", "low"], {"low": lora(target_modules=["classifier"])}, "classifier is a target of LoRA"),
        (["sparse", "low"], {"low": lora(target_modules=["layernorm_before"])}, "a LayerNorm, expected one of Linear"),
        (["sparse", "low"], {"low": lora(modules_to_save=["mlp.fc1"])}, r"mlp.fc1: an FPS adapter changes it"),
        (["low", "sparse"], {"low": lora(target_modules="all-linear")}, "classifier: a LoRA adapter changes it"),
        (["low", "sparse"], {"low": lora(modules_to_save=["fc1"]), "sparse": config(target_modules=["fc1"])}, "fc1"),
        (["sparse", "low"], {"low": LoHaConfig(target_modules=["q_proj"])}, "'low' is a LoHaConfig, expected"),
        (["low", "sparse"], {"low": LoHaConfig(target_modules=["q_proj"])}, "'low' is a LoHaConfig, expected"),
    ],
)  # fmt: skip
def test_what_both_would_change_is_refused(names: list[str], options: dict[str, Any], message: str) -> None:
    configs = {"low": lora(), "sparse": config()} | options
    model = mixed(names[:1], **options)
    with unchanged(model), pytest.raises(ValueError, match=message):
        model.add_adapter(names[1], configs[names[1]])


def test_the_remedy_for_all_linear_layers_works() -> None:
    model = mixed(["sparse", "low"], low=lora(target_modules="all-linear", exclude_modules="classifier.*"))
    close(logits(model), logits(reference(model, BOTH)))


def test_merged_models_take_no_adapter_and_unknown_names_are_refused() -> None:
    model = mixed()
    for call, message in (
        (lambda: model.merge_adapter(["low", "none"]), r"\['none'\], expected names among \['low', 'sparse'\]"),
        (lambda: model.merge_adapter(["low", "low"]), "more than once"),
        (lambda: model.base_model.set_adapter(["low", "low"]), "more than once"),
        (lambda: model.base_model.delete_adapter("none"), r"\['none'\], expected"),
        (lambda: model.add_weighted_adapter(["low", "sparse"], [1.0, 1.0], "sum"), r"\['low'\], expected FPS"),
    ):
        with unchanged(model), pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="expected a list"):
        model.merge_adapter("low")
    model.merge_adapter()
    for new in (lora(), config()):
        with unchanged(model), pytest.raises(ValueError, match=r"merged adapters \['sparse', 'low'\]"):
            model.add_adapter("new", new)


def test_lora_is_not_merged_into_a_weight_that_others_share() -> None:
    sparse = config(target_modules=["c_attn"])
    model = mixed(["low", "sparse"], tiny_gpt2(), low=lora(target_modules=["wte"]), sparse=sparse)
    with unchanged(model), pytest.raises(ValueError, match=r"transformer\.wte: lm_head has the same weight"):
        model.merge_adapter(BOTH[::-1])
    model.merge_adapter(["sparse"])


def test_fps_adapters_are_scaled_and_combined_beside_lora() -> None:
    model, twice = mixed(), mixed()
    model.add_weighted_adapter(["sparse"], [2.0], "twofold")
    twice.set_scale("sparse", 2.0)
    model.set_adapter(["low", "twofold"])
    close(logits(model), logits(twice))


def test_models_without_fps_adapters_run_pefts_code_alone() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fps_inner, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    model = get_peft_model(Named(), lora(target_modules=["last"]), mixed=True)
    model.add_adapter("other", LoHaConfig(target_modules=["fps_inner"]))
    assert type(model.base_model) is MixedModel
    assert not [name for name, p in model.named_parameters() if p.requires_grad and "lora" not in name]
    model.set_adapter(["default", "other"])
    assert [name for name, p in model.named_parameters() if p.requires_grad and "hada" in name]
    model.merge_and_unload()
