"""A scale multiplies an adapter's changes everywhere, and nowhere stays behind."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

import peft_fps
from tests.layers.comparisons import COMPILES, activate, several_adapters
from tests.support.helpers import (
    base_bytes,
    config,
    dense_change,
    dense_reference,
    fill,
    images,
    layers_of,
    normal,
    output,
    tiny_conv,
    tiny_gpt2,
    tiny_mlp,
    tiny_vit,
    tokens,
    unchanged,
    weighted_of,
)


pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")

MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "linear": (tiny_mlp, lambda: {"x": normal(3, 10)}, {}),
    "conv2d": (tiny_conv, lambda: {"x": normal(2, 3, 8, 8)}, {"modules_to_save": []}),
    "conv1d": (tiny_gpt2, lambda: {"input_ids": tokens(2)}, {}),
    "norms": (tiny_vit, lambda: {"pixel_values": images(2)}, {"bias": "with_norms", "modules_to_save": []}),
}


def two(kind: str) -> PeftModel:
    build, _, options = MODELS[kind]
    return several_adapters(build(), {"a": {}, "b": {"per_neuron": 3}}, **options)


def reference(kind: str, model: PeftModel, scales: dict[str, float]) -> nn.Module:
    """The base model with scaled dense changes added, entry by entry."""
    return dense_reference(MODELS[kind][0](), model, scales)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("scale", [0.0, 0.3, -1.5])
def test_a_scaled_adapter_changes_the_output_so_much(kind: str, scale: float) -> None:
    model, inputs = two(kind), MODELS[kind][1]()
    model.set_scale("a", scale)
    torch.testing.assert_close(output(model, **inputs), output(reference(kind, model, {"a": scale}), **inputs))


@pytest.mark.parametrize("kind", MODELS)
def test_several_adapters_have_scales_of_their_own(kind: str) -> None:
    model, inputs = two(kind), MODELS[kind][1]()
    activate(model, "a", "b")
    model.set_scale("a", 0.25)
    model.set_scale("b", -2)
    expected = output(reference(kind, model, {"a": 0.25, "b": -2.0}), **inputs)
    torch.testing.assert_close(output(model, **inputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merge_adds_scaled_changes_and_an_unmerge_restores_every_bit(kind: str, dtype: torch.dtype) -> None:
    model = two(kind).to(dtype)
    before = base_bytes(model)
    model.set_scale("a", 0.37)
    wanted = {
        path: layer.base_layer.weight.double() + 0.37 * dense_change(layer, "a")
        for path, layer in weighted_of(model).items()
    }
    biases = {
        path: layer.base_layer.bias.double() + 0.37 * layer.fps_bias["a"].double().view(layer.base_layer.bias.shape)
        for path, layer in layers_of(model).items()
        if "a" in layer.fps_bias
    }
    model.merge_adapter(["a"], safe_merge=True)
    step = {"rtol": 1e-6, "atol": 1e-7} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-30}
    for path, expected in wanted.items():
        torch.testing.assert_close(layers_of(model)[path].base_layer.weight.double(), expected, **step)
    for path, expected in biases.items():
        torch.testing.assert_close(layers_of(model)[path].base_layer.bias.double(), expected, **step)
    model.unmerge_adapter()
    assert base_bytes(model) == before


def test_the_scaled_sum_of_a_half_precision_adapter_rounds_once() -> None:
    layer = layers_of(two("linear").to(torch.bfloat16))["first"]
    layer.set_scale("a", 1 / 3)
    weight = layer.base_layer.weight.double()
    layer.merge(adapter_names=["a"])
    expected = (weight + dense_change(layer, "a") * torch.tensor(1 / 3).double()).to(torch.bfloat16)
    assert torch.equal(layer.base_layer.weight, expected)


def test_the_dense_change_is_scaled() -> None:
    layer = layers_of(two("linear"))["first"]
    layer.set_scale("a", -0.5)
    torch.testing.assert_close(layer.get_delta_weight("a").double(), -0.5 * dense_change(layer, "a"))


def test_gradients_are_those_of_the_scaled_change() -> None:
    model, x = two("linear").train(), normal(3, 10)
    model(x).sum().backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and "last" in name}
    model.zero_grad()
    fill(model, "a", seed=1)
    for layer in layers_of(model).values():
        for held in (layer.fps_values, layer.fps_bias):
            held["a"].data /= 0.5
    model.set_scale("a", 0.5)
    model(x).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if name in plain}
    assert len(found) == 2
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, 0.5 * plain[name])


def test_a_scale_of_one_is_the_same_bit_for_bit() -> None:
    model, x = two("linear"), normal(3, 10)
    expected = model(x)
    model.set_scale("a", 0.3)
    assert not torch.equal(model(x), expected)
    model.set_scale("a", 1)
    assert torch.equal(model(x), expected)


def test_layers_scale_their_active_adapters_as_those_of_lora_do() -> None:
    layer = layers_of(two("linear"))["first"]
    layer.set_scale("a", 2)
    layer.set_scale("nobody", 3)
    layer.scale_layer(3)
    assert layer.scaling == {"a": 6, "b": 1}
    layer.unscale_layer(4)
    assert layer.scaling == {"a": 1.5, "b": 1}
    layer.set_adapter(["a", "b"])
    layer.scale_layer(2)
    assert layer.scaling == {"a": 3, "b": 2}
    layer.unscale_layer()
    assert layer.scaling == {"a": 1, "b": 1}


def test_the_scale_goes_with_the_adapter() -> None:
    model = two("linear")
    model.set_scale("b", 2)
    model.delete_adapter("b")
    assert all(layer.scaling == {"a": 1} for layer in layers_of(model).values())
    model.add_adapter("b", config())
    assert all(layer.scaling == {"a": 1, "b": 1} for layer in layers_of(model).values())


def test_a_saved_adapter_does_not_hold_the_scale(tmp_path: Path) -> None:
    model = two("linear")
    model.save_pretrained(tmp_path / "before", selected_adapters=["a"])
    model.set_scale("a", 0.1)
    model.save_pretrained(tmp_path / "after", selected_adapters=["a"])
    before, after = (load_file(tmp_path / when / "a" / "adapter_model.safetensors") for when in ("before", "after"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    texts = [(tmp_path / when / "a" / "adapter_config.json").read_text() for when in ("before", "after")]
    assert texts[0] == texts[1]
    loaded = PeftModel.from_pretrained(tiny_mlp(), tmp_path / "after" / "a")
    assert all(layer.scaling == {"default": 1} for layer in layers_of(loaded).values())


def test_within_the_context_all_adapters_are_rescaled_and_afterwards_none() -> None:
    model, x = two("linear"), normal(3, 10)
    model.set_scale("a", 0.8)
    before = model(x)
    with peft_fps.rescale_adapter_scale(model, 0.5):
        torch.testing.assert_close(model(x), reference("linear", model, {"a": 0.4})(x))
        assert layers_of(model)["first"].scaling == {"a": 0.4, "b": 0.5}
    assert torch.equal(model(x), before)
    with peft_fps.rescale_adapter_scale(model, 0.5):
        model.delete_adapter("b")
    assert layers_of(model)["first"].scaling == {"a": 0.8}


def test_an_error_within_the_context_ends_the_rescaling_too() -> None:
    model = two("linear")
    context = peft_fps.rescale_adapter_scale(model, 0.5)
    context.__enter__()
    assert layers_of(model)["first"].scaling == {"a": 0.5, "b": 0.5}
    with pytest.raises(RuntimeError, match="inside"):
        context.gen.throw(RuntimeError("inside"))
    assert layers_of(model)["first"].scaling == {"a": 1, "b": 1}


@COMPILES
def test_a_compiled_model_follows_the_scale() -> None:
    model, x = two("linear"), normal(3, 10)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    model(x)
    for scale in (1, 0.5, -2.0, 0.25, 1):
        model.set_scale("a", scale)
        torch.testing.assert_close(compiled(x), reference("linear", model, {"a": scale})(x))


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "error", "message"),
    [
        ("1", TypeError, "scale is '1' of type str, expected a number"),
        (True, TypeError, "scale is True of type bool"),
        (float("nan"), ValueError, "scale is nan, expected a finite number"),
        (float("inf"), ValueError, "scale is inf"),
    ],
)
def test_a_scale_that_is_no_finite_number_is_refused(scale: Any, error: type[Exception], message: str) -> None:
    model = two("linear")
    layer = layers_of(model)["first"]
    for call in (lambda: model.set_scale("a", scale), lambda: layer.set_scale("a", scale)):
        with pytest.raises(error, match=message):
            call()
    for change in (layer.scale_layer, layer.unscale_layer):
        with pytest.raises(error, match=message):
            change(scale)
    with pytest.raises(error, match=message.replace("scale", "multiplier", 1)):
        peft_fps.rescale_adapter_scale(model, scale).__enter__()
    assert layer.scaling == {"a": 1, "b": 1}


def test_dividing_by_zero_is_refused() -> None:
    layer = layers_of(two("linear"))["first"]
    with pytest.raises(ValueError, match=r"scale is 0, expected a number to divide by.*unscale_layer\(\)"):
        layer.unscale_layer(0)


def test_an_unknown_adapter_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no FPS adapter named 'c' to scale, expected one of \['a', 'b'\]"):
        two("linear").set_scale("c", 2)


def test_a_merged_adapter_keeps_the_scale_that_it_was_merged_with() -> None:
    model = two("linear")
    model.set_scale("a", 0.5)
    layers_of(model)["last"].merge(adapter_names=["a"])
    calls = [
        lambda: model.set_scale("a", 2),
        lambda: layers_of(model)["last"].scale_layer(2),
        lambda: layers_of(model)["last"].unscale_layer(),
        lambda: peft_fps.rescale_adapter_scale(model, 2).__enter__(),
    ]
    for call in calls:
        with (
            unchanged(model),
            pytest.raises(ValueError, match=r"last: adapter 'a' is merged with the scale 0.5.*unme"),
        ):
            call()
        assert all(layer.scaling == {"a": 0.5, "b": 1} for layer in layers_of(model).values())
    model.set_scale("b", 3)
    model.set_scale("a", 0.5)
    layers_of(model)["last"].scale_layer(1)


def test_a_model_without_such_layers_is_refused() -> None:
    lora = get_peft_model(tiny_mlp(), LoraConfig(target_modules=["first"]))
    for model in (tiny_mlp(), lora):
        with pytest.raises(ValueError, match="has no FPS layer"):
            peft_fps.rescale_adapter_scale(model, 2).__enter__()
