"""Experts that lie in one tensor carry sparse changes through the whole life of an adapter."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file

import peft_fps
from peft_fps import FPSConfig, Selection
from peft_fps.base.packed_weight import OpenedModule
from tests.support.expert_models import EXPERTS, MODELS, expert_model, packed_layers, stored_change, write_changes
from tests.support.helpers import adapted, base_bytes, bits, config, fill, layers_of, normal, tokens, unchanged


pytestmark = pytest.mark.filterwarnings(
    "ignore:.*Llama4Router:UserWarning"
)  # a linear layer with a forward of its own
ALONE: dict[str, Any] = {"target_modules": [], "target_parameters": EXPERTS}
BATCH = {"input_ids": tokens(3, 7), "labels": tokens(3, 7)}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=BATCH["input_ids"]).logits


def adapter_values(model: Any) -> list[torch.Tensor]:
    return [layer.fps_values["default"] for layer in packed_layers(model).values()]


def parameters_of(model: Any) -> dict[str, bytes]:
    """The bytes of the base model's parameters by their names without any adapter."""
    held = {name: p for name, p in model.named_parameters() if "fps_" not in name}
    return {name.replace("base_model.model.", "").replace(".base_layer", ""): bits(p) for name, p in held.items()}


@pytest.mark.parametrize("implementation", [None, "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_those_of_dense_weights(name: str, implementation: str | None) -> None:
    model = adapted(expert_model(name, implementation), **ALONE)
    plain = expert_model(name, implementation)
    write_changes(plain, model)
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-5)
    model(**BATCH).loss.backward()
    plain(**BATCH).loss.backward()
    parameters = dict(plain.named_parameters())
    for path, layer in packed_layers(model).items():
        places = stored_change(layer) != 0
        dense = parameters[path].grad
        assert dense is not None
        transposed = dense.transpose(1, 2)[places.transpose(1, 2)] if layer.transposed else dense[places]
        torch.testing.assert_close(layer.fps_values["default"].grad, transposed, rtol=1e-3, atol=1e-6)
        if "default" in layer.fps_bias:
            bias = parameters[f"{path}_bias"].grad
            torch.testing.assert_close(layer.fps_bias["default"].grad, bias.flatten(), rtol=1e-3, atol=1e-6)
        assert layer.base_layer.weight.grad is None


@pytest.mark.parametrize("name", MODELS)
def test_the_life_of_an_adapter(name: str, tmp_path: Path) -> None:
    base = expert_model(name)
    plain, before = logits(base), parameters_of(base)
    model = adapted(base)
    assert {path.rpartition(".")[2] for path in packed_layers(model)} == {"gate_up_proj", "down_proj"}
    changed = logits(model)
    assert not torch.allclose(changed, plain)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    model.merge_adapter()
    assert torch.equal(logits(model), changed)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    model.unmerge_adapter()
    assert parameters_of(model) == before
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert {f"base_model.model.{path}.fps_values" for path in packed_layers(model)} <= keys.keys()
    loaded = PeftModel.from_pretrained(expert_model(name), tmp_path).eval()
    assert torch.equal(logits(loaded), changed)
    merged = loaded.merge_and_unload()
    assert torch.equal(logits(merged), changed)
    assert [name for name, _ in merged.named_modules()] == [name for name, _ in expert_model(name).named_modules()]
    assert parameters_of(model.unload()) == before


def test_by_default_experts_are_adapted_within_the_budget() -> None:
    model = get_peft_model(expert_model("gpt-oss"), FPSConfig(importance="magnitude", budget=0.05, bias="none"))
    report = model.selection_report()
    assert report.trained <= 0.05 * report.base_parameters
    entries = {layer.module: layer for layer in report.layers}
    gate_up = entries["model.layers.0.mlp.experts.gate_up_proj"]
    assert (gate_up.neurons, gate_up.inputs) == (4 * 24, 16)
    assert gate_up.entries > 0
    found = model.peft_config["default"].target_parameters
    assert found == [f"model.layers.0.mlp.{name}" for name in EXPERTS]


def test_the_selection_takes_the_largest_weights_of_each_neuron_in_either_storage_order() -> None:
    for name in ("Mixtral", "gpt-oss"):
        model = get_peft_model(expert_model(name), config(per_neuron=1, **ALONE))
        for layer in packed_layers(model).values():
            weight = layer.base_layer.weight.detach()
            rows = (weight.transpose(1, 2) if layer.transposed else weight).flatten(0, 1)
            assert layer.fps_columns["default"].tolist() == rows.abs().argmax(1).tolist()


def test_several_adapters_add_up_switch_and_go() -> None:
    base = expert_model("gpt-oss")
    model = adapted(base, **ALONE)
    model.add_adapter("other", config(seed=3, importance="random", target_modules=[], target_parameters=EXPERTS[:1]))
    fill(model, "other", seed=5)
    both, plain = {}, logits(expert_model("gpt-oss"))
    for names in (["default"], ["other"], ["default", "other"]):
        model.base_model.set_adapter(names)
        reference = expert_model("gpt-oss")
        for name in names:
            copied = deepcopy(model)
            for path in [p for p, layer in packed_layers(copied).items() if name not in layer.fps_values]:
                owner, _, own = path.rpartition(".")
                del copied.get_base_model().get_submodule(owner)._modules[own]
            write_changes(reference, copied, name)
        both[tuple(names)] = logits(model)
        torch.testing.assert_close(both[tuple(names)], logits(reference), rtol=1e-4, atol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), both["default", "other"], rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    model.delete_adapter("other")
    torch.testing.assert_close(logits(model), both["default",], rtol=0, atol=0)
    model.delete_adapter("default")
    assert torch.equal(logits(model.base_model.model), plain)


def test_scales_weighted_adapters_and_selections() -> None:
    model = adapted(expert_model("gpt-oss"), **ALONE)
    once = logits(model)
    model.base_model.add_weighted_adapter(["default", "default"], [0.5, 0.5], "mean")
    model.set_adapter("mean")
    torch.testing.assert_close(logits(model), once)
    model.set_adapter("default")
    model.base_model.set_scale("default", 0.0)
    torch.testing.assert_close(logits(model), logits(expert_model("gpt-oss")))
    selection = Selection.of(model, "default")
    other = get_peft_model(expert_model("gpt-oss"), config(importance="random", **ALONE))
    selection.apply(other)
    assert Selection.of(other).modules == selection.modules


def test_a_file_takes_the_place_of_a_loaded_adapter(tmp_path: Path) -> None:
    first = adapted(expert_model("gpt-oss"), **ALONE)
    second = adapted(expert_model("gpt-oss"), importance="random", seed=4, **ALONE)
    second.save_pretrained(tmp_path)
    peft_fps.hotswap_adapter(first, str(tmp_path), "default")
    assert torch.equal(logits(first), logits(second))


def test_a_state_dict_alone_says_what_is_adapted() -> None:
    model = adapted(expert_model("Mixtral"), **ALONE)
    state = {key.removeprefix("base_model.model."): t for key, t in get_peft_model_state_dict(model).items()}
    found = deepcopy(model.peft_config["default"])
    found.record = found.record_to_save
    bare = inject_adapter_in_model(found, expert_model("Mixtral"), state_dict=state).eval()
    set_peft_model_state_dict(bare, state)
    assert torch.equal(logits(bare), logits(model))


def test_transformers_loads_the_adapter(tmp_path: Path) -> None:
    model = adapted(expert_model("Mixtral"), **ALONE)
    model.save_pretrained(tmp_path)
    base = expert_model("Mixtral")
    base.load_adapter(str(tmp_path))
    assert torch.equal(logits(base.eval()), logits(model))


def test_a_refused_file_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    adapted(expert_model("Mixtral"), **ALONE).save_pretrained(tmp_path)
    other = expert_model("Mixtral")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 1.0
    with unchanged(other), pytest.raises(ValueError, match="base weights"):
        PeftModel.from_pretrained(other, tmp_path)
    assert not any(isinstance(module, OpenedModule) for module in other.modules())


def test_one_name_for_all_samples() -> None:
    model = adapted(expert_model("Mixtral"), **ALONE)
    ids = BATCH["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids, adapter_names=["default"] * 3).logits, logits(model))
        plain = model(input_ids=ids, adapter_names=["__base__"] * 3).logits
        torch.testing.assert_close(plain, logits(expert_model("Mixtral")))
        with pytest.raises(ValueError, match=r"gate_up_proj: adapter_names holds .*expected one adapter for all samp"):
            model(input_ids=ids, adapter_names=["default", "__base__", "default"])


@pytest.mark.filterwarnings("ignore:.*checkpointing.*is deprecated:FutureWarning")
def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointed in (False, True):
        model = adapted(expert_model("Qwen3-MoE"), **ALONE).train()
        if checkpointed:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        model(**BATCH).loss.backward()
        gradients.append([layer.fps_values["default"].grad for layer in packed_layers(model).values()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_compiled_experts_compute_the_same() -> None:
    model = adapted(expert_model("Llama 4"), **ALONE)
    experts = model.get_base_model().get_submodule("model.layers.0.feed_forward.experts")
    x = normal(8, 16).requires_grad_()
    results = []
    for run in (experts, torch.compile(experts, backend="eager", fullgraph=True)):
        output = run(x)
        results.append([output, *torch.autograd.grad(output.square().sum(), [x, *adapter_values(model)])])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.filterwarnings("ignore:Experts without a token")
@pytest.mark.parametrize("importance", ["gradient", "movement"])
def test_gradients_choose_entries(importance: str) -> None:
    base = expert_model("gpt-oss")
    plain = deepcopy(base)
    model = get_peft_model(base, FPSConfig(per_neuron=1, importance=importance, loss="task", bias="none", **ALONE))
    before = base_bytes(model)
    model.calibrate([BATCH], progress=False)
    assert base_bytes(model) == before
    if importance == "movement":
        return
    plain(**BATCH).loss.backward()
    for path, layer in packed_layers(model).items():
        gradient = dict(plain.named_parameters())[path].grad
        assert gradient is not None
        rows = gradient.transpose(1, 2).flatten(0, 1).abs()
        chosen = layer.fps_columns["default"].long()
        torch.testing.assert_close(rows.gather(1, chosen[:, None])[:, 0], rows.max(1).values, rtol=1e-4, atol=1e-9)


def test_layers_beside_the_experts_are_adapted_too() -> None:
    model = get_peft_model(expert_model("DeepSeek-V3"), config())
    assert any("shared_experts" in path for path in layers_of(model))
    assert len(packed_layers(model)) == 2
