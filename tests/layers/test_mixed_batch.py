"""Every sample of a batch is computed as it would be alone, under the adapter that it asks for."""

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from peft_fps.layers.sample_names import by_adapter
from tests.layers.comparisons import COMPILES, several_adapters
from tests.support.helpers import (
    images,
    layers_of,
    normal,
    output,
    tiny_bert,
    tiny_conv,
    tiny_gpt2,
    tiny_llama,
    tiny_mlp,
    tiny_vit,
    tokens,
    unchanged,
)


NAMES = ["b", "__base__", "a", "b", "a"]
WITH_NORMS = {"bias": "with_norms"}
MODELS: dict[str, tuple[Any, str, Any, dict[str, Any]]] = {
    "linear": (tiny_mlp, "x", lambda: normal(5, 10), {}),
    "conv2d": (tiny_conv, "x", lambda: normal(5, 3, 8, 8), {"modules_to_save": ["head"]}),
    "conv1d": (tiny_gpt2, "input_ids", lambda: tokens(5), {}),
    "language model": (tiny_llama, "input_ids", lambda: tokens(5), {}),
    "image classifier": (tiny_vit, "pixel_values", lambda: images(5), {}),
    "text classifier": (tiny_bert, "input_ids", lambda: tokens(5), WITH_NORMS),
    "norms": (tiny_vit, "pixel_values", lambda: images(5), WITH_NORMS),
}


def perturb_heads(model: nn.Module, seed: int) -> None:
    """Give the copy that each adapter has of a module trained whole numbers of its own."""
    for name, parameter in model.named_parameters():
        if ".modules_to_save." in name:
            parameter.data += 0.5 * normal(*parameter.shape, seed=seed + len(name) + (".b." in name))


def two(build: Any, own: dict[str, dict[str, Any]] | None = None, **options: Any) -> Any:
    model = several_adapters(build(), own or {"a": {}, "b": {"per_neuron": 3}}, **options)
    perturb_heads(model, seed=7)
    return model


def under(name: str, model: PeftModel, **inputs: Any) -> Tensor:
    """What the model computes with one adapter, or with none."""
    if name == "__base__":
        with model.disable_adapter():
            return output(model, **inputs)
    model.set_adapter(name)
    return output(model, **inputs)


def alone(model: PeftModel, key: str, x: Tensor, names: list[str]) -> Tensor:
    """Every sample in a call of its own, under its adapter alone."""
    active = model.active_adapters
    outputs = [under(name, model, **{key: sample}) for sample, name in zip(x.split(1), names, strict=True)]
    model.set_adapter(active[0])
    return torch.cat(outputs)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("active", ["a", "b"])
def test_every_sample_is_computed_as_it_would_be_alone(kind: str, active: str) -> None:
    build, key, inputs, options = MODELS[kind]
    model, x = two(build, **options), inputs()
    expected = alone(model, key, x, NAMES)
    model.set_adapter(active)
    with torch.no_grad():
        found = output(model, **{key: x}, adapter_names=NAMES)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(expected[0], alone(model, key, x[:1], ["a"])[0], atol=1e-4)  # names do matter here
    assert not torch.allclose(expected[0], alone(model, key, x[:1], ["__base__"])[0], atol=1e-4)


@pytest.mark.parametrize("name", ["a", "b", "__base__"])
def test_a_batch_of_one_adapter_is_bit_for_bit_what_that_adapter_gives(name: str) -> None:
    model, x = two(tiny_vit), images(4)
    expected = under(name, model, pixel_values=x)
    model.set_adapter("a")
    assert torch.equal(output(model, pixel_values=x, adapter_names=[name] * 4), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_as_it_does_alone(dtype: torch.dtype) -> None:
    model, x = two(tiny_mlp).to(dtype), normal(5, 10, dtype=dtype)
    # an output of 4 numbers of some units in the last place
    torch.testing.assert_close(model(x, adapter_names=NAMES), alone(model, "x", x, NAMES), rtol=1e-2, atol=1e-2)


def test_adapters_with_other_modules_leave_those_modules_to_the_base_model() -> None:
    own = {"a": {"target_modules": ["q_proj"]}, "b": {"target_modules": ["fc1"], "modules_to_save": []}}
    model, x = two(tiny_vit, own), images(5)
    for active in ("a", "b"):
        model.set_adapter(active)
        found = output(model, pixel_values=x, adapter_names=NAMES)
        torch.testing.assert_close(found, alone(model, "pixel_values", x, NAMES), rtol=1e-5, atol=1e-6)


def test_scales_hold_within_a_batch() -> None:
    model, x = two(tiny_mlp), normal(5, 10)
    model.set_scale("b", -0.5)
    torch.testing.assert_close(model(x, adapter_names=NAMES), alone(model, "x", x, NAMES))


def test_base_layers_with_hooks_run_with_them() -> None:
    model, x = two(tiny_mlp), normal(5, 10)
    layers_of(model)["first"].base_layer.register_forward_hook(lambda module, args, result: 2 * result)
    torch.testing.assert_close(model(x, adapter_names=NAMES), alone(model, "x", x, NAMES))


def test_gradients_reach_the_adapters_of_the_samples() -> None:
    model, x = two(tiny_mlp), normal(5, 10).requires_grad_()
    for name in ("a", "b"):
        model.set_requires_grad(name)
    alone(model, "x", x, NAMES).square().sum().backward()
    for name in ("a", "b"):  # calls under one adapter have frozen the other
        model.set_requires_grad(name)
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    wanted, x.grad = x.grad, None
    model.zero_grad()
    model(x, adapter_names=NAMES).square().sum().backward()
    torch.testing.assert_close(x.grad, wanted)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() >= {name for name, gradient in expected.items() if gradient.any()}
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


def test_nothing_stays_behind() -> None:
    model, x = two(tiny_vit), images(5)
    expected = output(model, pixel_values=x)
    with unchanged(model):
        output(model, pixel_values=x, adapter_names=NAMES)
    assert torch.equal(output(model, pixel_values=x), expected)


def test_with_adapters_disabled_the_base_model_computes_all() -> None:
    model, x = two(tiny_vit), images(2)
    with model.disable_adapter():
        expected = output(model, pixel_values=x)
        assert torch.equal(output(model, pixel_values=x, adapter_names=["a", "b"]), expected)


# --- generation -----------------------------------------------------------------------------------------------------


GENERATION = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": 49}


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
def test_generation_takes_one_name_per_prompt(options: dict[str, Any]) -> None:
    model, x = two(tiny_gpt2, task_type="CAUSAL_LM"), tokens(3)
    with model.disable_adapter():
        base = model.generate(input_ids=x[1:2], **GENERATION, **options)
    expected = [model.generate(input_ids=x[:1], **GENERATION, **options), base]
    model.set_adapter("b")
    expected.append(model.generate(input_ids=x[2:], **GENERATION, **options))
    names = ["a", "__base__", "b"]
    found = model.generate(input_ids=x, adapter_names=names, **GENERATION, **options)
    assert torch.equal(found, torch.cat(expected))


def test_beams_of_an_encoder_decoder_model() -> None:
    settings = T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    torch.manual_seed(0)
    model = two(lambda: T5ForConditionalGeneration(settings).eval(), task_type="SEQ_2_SEQ_LM")
    x, options = tokens(2), {**GENERATION, "num_beams": 3}
    expected = [model.generate(input_ids=x[:1], **options)]
    model.set_adapter("b")
    expected.append(model.generate(input_ids=x[1:], **options))
    found = model.generate(input_ids=x, adapter_names=["a", "b"], **options)
    assert torch.equal(found, torch.cat(expected))


# --- threads --------------------------------------------------------------------------------------------------------


def together(module: nn.Module, calls: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """Run calls in threads that are all within the module at the same time, at every one of its first few uses."""
    barrier, results = threading.Barrier(len(calls)), {}

    def wait(*_: Any) -> None:
        with contextlib.suppress(threading.BrokenBarrierError):
            barrier.wait(1)

    def run(name: str) -> None:
        try:
            with torch.no_grad():
                results[name] = calls[name]()
        except Exception as error:
            results[name] = error

    handle = module.register_forward_hook(wait)
    threads = [threading.Thread(target=run, args=(name,)) for name in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    handle.remove()
    return results


@pytest.mark.parametrize("kind", ["linear", "image classifier", "norms"])
def test_names_hold_for_their_own_call_alone(kind: str) -> None:
    build, key, inputs, options = MODELS[kind]
    model = two(build, **options)
    call = partial(output, model, **{key: inputs()})
    calls = {
        "plain": call,
        "names": partial(call, adapter_names=NAMES),
        "other names": partial(call, adapter_names=["a", "a", "b", "__base__", "b"]),
    }
    with torch.no_grad():
        expected = {text: call() for text, call in calls.items()}
    *_, last = layers_of(model).values()
    found = together(last.base_layer, calls)
    for text, result in expected.items():
        torch.testing.assert_close(found[text], result)


def test_names_hold_for_their_own_generation_alone() -> None:
    model, x = two(tiny_gpt2, task_type="CAUSAL_LM"), tokens(3)
    kinds: dict[str, dict[str, Any]] = {
        "plain": {},
        "names": {"adapter_names": ["a", "__base__", "b"]},
        "beams": {"adapter_names": ["b", "b", "__base__"], "num_beams": 2},
    }
    calls = {text: partial(model.generate, input_ids=x, **GENERATION, **options) for text, options in kinds.items()}
    expected = {text: call() for text, call in calls.items()}
    first = next(iter(layers_of(model).values()))
    found = together(first.base_layer, calls)
    for text, result in expected.items():
        assert torch.equal(found[text], result), text


def test_a_call_that_fails_leaves_no_names_behind() -> None:
    model, x = two(tiny_mlp), normal(3, 10)
    expected = model(x)
    with pytest.raises(ValueError, match="expected one for each of the 3"):
        model(x, adapter_names=["a", "b"])
    assert torch.equal(model(x), expected)


def test_a_model_within_a_model_has_names_of_its_own() -> None:
    inner, x = two(tiny_mlp), normal(3, 10)
    plain, named = inner(x), inner(x, adapter_names=["a", "b", "b"])
    outer = two(tiny_mlp)
    layers_of(outer)["last"].base_layer.register_forward_hook(
        lambda *_: seen.append((inner(x), inner(x, adapter_names=["a", "b", "b"])))
    )
    seen: list[Any] = []
    expected = outer(normal(2, 10), adapter_names=["b", "a"])
    assert torch.equal(seen[0][0], plain)
    assert torch.equal(seen[0][1], named)
    assert torch.equal(outer(normal(2, 10), adapter_names=["b", "a"]), expected)


def test_first_forwards_of_many_threads() -> None:
    """Structures are derived by all of them."""
    model, x = two(tiny_mlp), normal(3, 10)
    model.base_model.set_adapter(["a", "b"])
    twin = deepcopy(model)
    expected = model(x)
    found: list[Tensor] = []
    threads = [threading.Thread(target=lambda: found.append(twin(x))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all(torch.equal(result, expected) for result in found)


@COMPILES
def test_a_compiled_model_takes_the_names_of_each_call() -> None:
    """The first call's names were compiled into the graph."""
    model, x = two(tiny_mlp, target_modules=["first"], modules_to_save=["last"]), normal(5, 10)
    plain, compiled = model(x), torch.compile(model, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), plain)
        for names in (NAMES, NAMES[::-1], ["__base__"] * 5):
            torch.testing.assert_close(compiled(x, adapter_names=names), model(x, adapter_names=names))
            torch.testing.assert_close(compiled(x), plain)


# --- groups ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=8))
def test_groups_run_once_and_come_back_in_order(names: list[str]) -> None:
    x, calls = torch.arange(2.0 * len(names)).view(-1, 2), []

    def apply(name: str, part: Tensor) -> Tensor:
        calls.append((name, part[:, 0].tolist()))
        return part * 10 + ord(name)

    expected = torch.stack([row * 10 + ord(name) for row, name in zip(x, names, strict=True)])
    assert torch.equal(by_adapter(apply, x, names), expected)
    rows = {name: [2.0 * i for i, each in enumerate(names) if each == name] for name in names}
    assert dict(calls) == rows
    assert len(calls) == len(rows)


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        *((names, TypeError, "adapter_names is .* one name per sample") for names in ("ab", [], ["a", 1], {"a"}, 3)),
        (["d", "c"], ValueError, r"adapter_names holds \['c', 'd'\], expected names among \['a', 'b'\] and"),
        *(
            (["a"] * count, ValueError, f"first: adapter_names has {count} names, expected one for each of the 2")
            for count in (1, 4)
        ),
    ],
)
def test_names_that_are_not_one_known_name_for_each_sample_are_refused(
    names: Any, error: type[Exception], message: str
) -> None:
    model, x = two(tiny_mlp), normal(2, 10)
    with unchanged(model), pytest.raises(error, match=message):
        model(x, adapter_names=names)


def test_training_mode_is_refused() -> None:
    model, x = two(tiny_mlp).train(), normal(2, 10)
    with unchanged(model), pytest.raises(ValueError, match=r"training mode, expected inference. Call model.eval\(\)"):
        model(x, adapter_names=["a", "b"])


def test_merged_adapters_are_refused() -> None:
    model, x = two(tiny_mlp), normal(2, 10)
    layers_of(model)["last"].merge(adapter_names=["b"])
    message = r"last: found merged adapters \['b'\], expected none.*unmerge_adapter"
    with unchanged(model), pytest.raises(ValueError, match=message):
        model(x, adapter_names=["a", "__base__"])
    with pytest.raises(ValueError, match="last: found merged adapters"):
        layers_of(model)["last"](normal(1, 12), adapter_names=["a"])


def test_heads_that_peft_cannot_run_by_sample_are_refused() -> None:
    def headed() -> nn.Module:
        return nn.Sequential(OrderedDict(body=nn.Linear(4, 4), head=nn.Sequential(nn.Linear(4, 2))))

    model = two(headed, target_modules=["body"], modules_to_save=["head"])
    message = r"head is trained whole \(modules_to_save\) and a Sequential, expected one of"
    with unchanged(model), pytest.raises(ValueError, match=message):
        model(normal(2, 4), adapter_names=["a", "b"])
