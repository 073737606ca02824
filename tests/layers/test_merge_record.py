"""Merging is exact, and unmerging leaves no trace."""

import copy
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from itertools import permutations
from types import MethodType
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_module
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_fps.layers import entry_layer
from peft_fps.layers.entry_layer import EntryLayer
from peft_fps.layers.merge_record import independent_copy, merge_entries
from tests.layers.comparisons import activate, several_adapters
from tests.support.combinations import pairwise
from tests.support.helpers import (
    adapted,
    base_bytes,
    bits,
    config,
    dense_change,
    dense_reference,
    fill,
    images,
    layers_of,
    normal,
    output,
    selected_columns,
    tiny_bert,
    tiny_conv,
    tiny_gpt2,
    tiny_mlp,
    tiny_vit,
    tokens,
    unchanged,
)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (tiny_mlp, lambda: normal(3, 10)),
    "conv": (tiny_conv, images),
    "vit": (tiny_vit, images),
    "gpt2": (tiny_gpt2, tokens),
    "bert": (tiny_bert, tokens),
}
KINDS = [(kind, "all") for kind in ("mlp", "conv", "vit", "gpt2")]
KINDS += [(kind, "with_norms") for kind in ("vit", "gpt2", "bert")]
BIASES = pytest.mark.parametrize(("kind", "bias"), KINDS)
HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALVES]


def with_three(build: Callable[[], nn.Module] = tiny_mlp, dtype: torch.dtype = torch.float32) -> Any:
    """Three adapters that overlap in most of their entries."""
    third = {"per_neuron": 4, "bias": "none", "importance": "random"}
    each = {"a": {"per_neuron": 6}, "b": {"per_neuron": 5}, "c": third}
    return several_adapters(build().to(dtype), each, modules_to_save=[])


shared_model = cache(lambda dtype: with_three(tiny_conv, dtype))


def merged_tensors(model: Any, names: list[str]) -> dict[str, bytes]:
    """What the base tensors must hold: one adapter after the other added in float32, and rounded to their dtype."""
    expected = {}
    for path, layer in layers_of(model).items():
        weight, bias = layer.base_layer.weight.detach(), layer.base_layer.bias
        for name in names:
            if isinstance(layer, EntryLayer):
                change = dense_change(layer, name).float()
                weight = torch.where(change != 0, (weight.float() + change).to(weight.dtype), weight)
            if name in layer.fps_bias:
                bias = (bias.detach().float() + layer.fps_bias[name].detach().float()).to(bias.dtype)
        expected[f"{path}.weight"] = bits(weight)
        if bias is not None:
            expected[f"{path}.bias"] = bits(bias)
    return expected


def quiet_merge(model: Any, names: list[str] | None = None, **options: Any) -> None:
    """Without the remark that rounding swallowed something, and PEFT's that others are merged already."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Merging lost|Already following adapters")
        model.merge_adapter(names, **options)


@contextmanager
def merged_exactly(model: Any, *groups: list[str], **options: Any) -> Iterator[None]:
    """Merge one group of adapters after the other for a while; the sums are exact, and no trace is left of them."""
    expected, before = merged_tensors(model, sum(groups, []) or ["default"]), base_bytes(model)
    for names in groups or [None]:
        quiet_merge(model, names, **options)
    assert base_bytes(model) == expected
    yield
    model.unmerge_adapter()
    assert base_bytes(model) == before


# --- merging --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "dtype", "safe"), pairwise(KINDS, DTYPES, [False, True]))
def test_merged_weights_are_exact(kind: tuple[str, str], dtype: torch.dtype, safe: bool):
    model = adapted(MODELS[kind[0]][0]().to(dtype), per_neuron=3, bias=kind[1])
    with merged_exactly(model, safe_merge=safe):
        assert all(layer.merged for layer in layers_of(model).values())


@BIASES
def test_a_merged_model_computes_what_the_adapter_computes(kind: str, bias: str):
    build, data = MODELS[kind]
    model, x = adapted(build(), per_neuron=3, modules_to_save=[], bias=bias), data()
    expected = output(dense_reference(build(), model, ["default"]), x)
    torch.testing.assert_close(output(model, x), expected, rtol=1e-5, atol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(output(model, x), expected, rtol=1e-5, atol=1e-5)


def test_merging_touches_the_selected_entries_only():
    model = adapted(tiny_conv(), per_neuron=2)
    layers = layers_of(model)
    before = {name: layer.base_layer.weight.detach().clone() for name, layer in layers.items()}
    storages = {name: layer.base_layer.weight.data_ptr() for name, layer in layers.items()}
    model.merge_adapter()
    for name, layer in layers.items():
        changed = (layer.base_layer.weight != before[name]).flatten(1)
        assert [row.nonzero()[:, 0].tolist() for row in changed] == selected_columns(layer)
        assert layer.base_layer.weight.data_ptr() == storages[name]


@pytest.mark.parametrize("channels_last", [False, True], ids=["", "channels-last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merging_convolutions_in_any_memory_format(channels_last: bool, dtype: torch.dtype):
    model = adapted(tiny_conv().to(dtype), per_neuron=3)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    with merged_exactly(model):
        stem = layers_of(model)["stem"].base_layer.weight
        assert stem.is_contiguous(memory_format=torch.channels_last) is channels_last


def test_merging_a_weight_that_is_a_transposed_view():
    base = tiny_mlp()
    base.first.weight = nn.Parameter(base.first.weight.detach().t().contiguous().t(), requires_grad=False)
    model = adapted(base)
    with merged_exactly(model):
        assert layers_of(model)["first"].merged


# --- several adapters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(st.sampled_from([list(order) for count in (1, 2, 3) for order in permutations("abc", count)]), st.booleans())
def test_any_adapters_in_any_order_are_unmerged_bit_for_bit(dtype: torch.dtype, order: list[str], together: bool):
    model = shared_model(dtype)
    with merged_exactly(model, *[order] if together else [[name] for name in order]):
        assert [layer.merged_adapters for layer in layers_of(model).values()] == [order] * 4
    assert not any(layer.merged for layer in layers_of(model).values())


def test_merging_again_after_training_on():
    model = with_three()
    for seed in range(3):
        fill(model, "a", seed=seed)
        with merged_exactly(model, ["a"]):
            assert layers_of(model)["first"].merged


def test_active_adapters_are_merged_by_default():
    model = with_three()
    activate(model, "b", "a")
    expected = merged_tensors(model, ["b", "a"])
    model.merge_adapter()
    assert base_bytes(model) == expected


def test_merging_what_is_merged_changes_nothing():
    model = with_three()
    model.merge_adapter(["a"])
    merged = base_bytes(model)
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        model.merge_adapter(["a"])
    assert base_bytes(model) == merged
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()


def test_other_adapters_can_be_trained_and_merged_after_unmerging():
    model = with_three()
    before = base_bytes(model)
    model.merge_adapter(["a"])
    model.unmerge_adapter()
    model.set_adapter("b")
    model.train()(normal(3, 10)).sum().backward()
    assert layers_of(model)["first"].fps_values["b"].grad.any()
    assert base_bytes(model) == before
    expected = merged_tensors(model, ["b"])
    model.merge_adapter(["b"])
    assert {name: value for name, value in base_bytes(model).items() if name in expected} == expected
    model.unmerge_adapter()
    assert base_bytes(model) == before


# --- refusals -------------------------------------------------------------------------------------------------------


PARTS = [
    ("mlp", "fps_values", "all"),
    ("mlp", "fps_bias", "all"),
    ("vit", "fps_values", "all"),
    ("vit", "fps_bias", "all"),
    ("vit", "fps_bias", "with_norms"),
]


@pytest.mark.parametrize(
    ("broken", "number", "method"),
    pairwise(PARTS, [torch.nan, torch.inf, -torch.inf], ["merge_adapter", "merge_and_unload"]),
)
def test_safe_merge_is_all_or_nothing(broken: tuple[str, str, str], number: float, method: str):
    """With norms the last layer is one."""
    kind, part, bias = broken
    model = adapted(MODELS[kind][0](), bias=bias)
    *_, (last, layer) = layers_of(model).items()
    with torch.no_grad():
        getattr(layer, part)["default"][-1] = number
    with unchanged(model), pytest.raises(ValueError, match=last):
        getattr(model, method)(safe_merge=True)
    assert not any(layer.merged for layer in layers_of(model).values())


def test_safe_merge_names_what_peft_names():
    model = adapted(tiny_mlp())
    with torch.no_grad():
        layers_of(model)["last"].fps_values["default"][0] = torch.nan
    named = "^NaNs detected in the merged weights. The adapter default seems to be broken"
    with pytest.raises(ValueError, match=rf"{named}.*training diverged.*learning rate.*file is damaged.*Nothing was"):
        model.merge_adapter(safe_merge=True)


def test_changes_that_are_not_finite_may_come_from_training_and_others_not():
    model = adapted(tiny_mlp())
    layer = layers_of(model)["last"]
    values = layer.fps_values["default"].data
    layer.fps_values["default"].data = torch.full_like(values, torch.inf)
    layer.forget("default")
    with pytest.raises(ValueError, match=r"last.*NaN or infinity.*Either training diverged.*Or the adapter's file"):
        model.merge_adapter()
    layer.fps_values["default"].data = values
    layer.fps_columns["default"][0] = 999
    layer.forget("default")
    with pytest.raises(ValueError, match=r"last.*damaged or incomplete; load an intact file") as refused:
        model.merge_adapter()
    assert "diverged" not in str(refused.value)


@pytest.mark.parametrize("together", [True, False], ids=["together", "one-by-one"])
@pytest.mark.parametrize(("dtype", "change"), [(torch.float16, 4e4), (torch.float32, 2e38)], ids=str)
def test_safe_merge_sees_overflow_of_several_adapters(dtype: torch.dtype, change: float, together: bool):
    model = adapted(tiny_mlp().to(dtype), "a", per_neuron=10)
    model.add_adapter("b", config(per_neuron=10))
    for name in "ab":
        layers_of(model)["last"].fps_values[name].data.fill_(change)
    if not together:
        model.merge_adapter(["a"], safe_merge=True)
    with unchanged(model), pytest.raises(ValueError, match="last"):
        quiet_merge(model, ["a", "b"] if together else ["b"], safe_merge=True)


@pytest.mark.parametrize("safe", [False, True], ids=["", "safe"])
def test_every_layer_is_merged_once(safe: bool, monkeypatch: pytest.MonkeyPatch):
    merged: list[Any] = []

    def counted(base: Any, *arguments: Any) -> Any:
        merged.append(base)
        return merge_entries(base, *arguments)

    monkeypatch.setattr(entry_layer, "merge_entries", counted)
    model = with_three()
    quiet_merge(model, ["a", "c"], safe_merge=safe)
    assert merged == [layer.base_layer for layer in layers_of(model).values() for _ in "ac"]


def test_a_layer_that_would_overflow_is_as_it_was():
    model = adapted(tiny_mlp().half())
    layer = layers_of(model)["last"]
    layer.fps_values["default"].data.fill_(1e5)
    message = "NaNs detected .*last would hold NaN or infinity.*Nothing was merged"
    with unchanged(model), pytest.raises(ValueError, match=message):
        layer.merge(safe_merge=True)
    assert not layer.merged
    assert layer.merge_records == {}


@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("names", [["missing"], ["default", "missing"]], ids="+".join)
def test_an_unknown_adapter_is_refused(method: str, names: list[str]):
    model = adapted(tiny_mlp())
    with unchanged(model), pytest.raises(ValueError, match=r"\['missing'\], expected names among \['default'\]"):
        getattr(model, method)(adapter_names=names)
    assert len(layers_of(model)) == 2


def test_a_name_instead_of_a_list_is_refused():
    model = adapted(tiny_mlp())
    with unchanged(model), pytest.raises(TypeError, match="adapter_names is 'default', expected a list of names"):
        model.merge_adapter("default")


# --- unloading ------------------------------------------------------------------------------------------------------


@BIASES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merge_and_unload_gives_a_plain_model(kind: str, bias: str, dtype: torch.dtype):
    build, data = MODELS[kind]
    model, x = adapted(build().to(dtype), bias=bias), data()
    x = x.to(dtype) if x.is_floating_point() else x
    quiet_merge(model)
    expected = output(model, x)
    model.unmerge_adapter()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Merging lost")
        plain = model.merge_and_unload()
    assert list(plain.state_dict()) == list(build().state_dict())
    assert [type(module) for module in plain.modules()] == [type(module) for module in build().modules()]
    assert torch.equal(output(plain, x), expected)
    fresh = build().to(dtype)
    fresh.load_state_dict(plain.state_dict())
    assert torch.equal(output(fresh, x), expected)


def test_a_trained_head_is_merged_along():
    model = adapted(tiny_vit())
    wrapper = model.base_model.model.classifier
    with torch.no_grad():
        wrapper.modules_to_save["default"].weight.fill_(0.5)
    assert torch.equal(model.merge_and_unload().classifier.weight, torch.full((5, 32), 0.5))


@BIASES
@pytest.mark.parametrize("merged_before", [False, True], ids=["", "merged-before"])
def test_unload_restores_the_base(kind: str, bias: str, merged_before: bool):
    build, data = MODELS[kind]
    model = adapted(build(), bias=bias)
    if merged_before:
        model.merge_adapter()
    plain, original = model.unload(), build()
    assert [type(module) for module in plain.modules()] == [type(module) for module in original.modules()]
    assert {n: bits(t) for n, t in plain.state_dict().items()} == {
        n: bits(t) for n, t in original.state_dict().items()
    }
    assert torch.equal(output(plain, data()), output(original, data()))


def test_merge_and_unload_of_chosen_adapters():
    model = with_three()
    expected = merged_tensors(model, ["c", "a"])
    plain = model.merge_and_unload(adapter_names=["c", "a"])
    found = {name: bits(tensor) for name, tensor in plain.state_dict().items()}
    assert found == expected


def test_a_merged_model_can_be_adapted_again():
    once = adapted(tiny_vit()).merge_and_unload()
    plain = copy.deepcopy(once)
    model = adapted(once, per_neuron=1)
    expected = output(dense_reference(plain, model, ["default"]), images())
    torch.testing.assert_close(output(model, images()), expected, rtol=1e-5, atol=1e-5)


# --- disabled while merged ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_disabled_while_merged_equals_the_base_bit_for_bit(kind: str, dtype: torch.dtype):
    build, data = MODELS[kind]
    x = data().to(dtype) if data().is_floating_point() else data()
    model = with_three(build, dtype)
    expected = output(build().to(dtype), x)
    quiet_merge(model, ["b", "a"])
    merged = base_bytes(model)
    with model.disable_adapter():
        assert torch.equal(output(model, x), expected)
    assert base_bytes(model) == merged
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(output(model, x), expected)


def test_disabled_while_merged_in_channels_last_memory():
    base = tiny_conv().to(memory_format=torch.channels_last)
    x = images().to(memory_format=torch.channels_last)
    expected = base(x)
    model = adapted(base)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(x), expected)


def test_disabled_while_merged_with_gradients():
    model, x = adapted(tiny_mlp()), normal(3, 10).requires_grad_()
    (expected,) = torch.autograd.grad(tiny_mlp()(x).sum(), x)
    model.merge_adapter()
    with model.disable_adapter():
        (found,) = torch.autograd.grad(model(x).sum(), x)
    assert torch.equal(found, expected)


def test_disabled_forwards_of_a_merged_model_in_two_threads():
    """The second enters a layer while the first is in it, and leaves it after the first (or waits for its turn)."""
    model, x = adapted(tiny_mlp()), normal(3, 10)
    expected = tiny_mlp()(x)
    model.merge_adapter()
    merged, parameters = base_bytes(model), dict(model.named_parameters())
    inside = {"first": threading.Event(), "second": threading.Event()}
    first_left = threading.Event()
    results: dict[str, Tensor] = {}

    def wait(*_: Any) -> None:
        name = threading.current_thread().name
        inside[name].set()
        (first_left if name == "second" else inside["second"]).wait(2)

    def run() -> None:
        name = threading.current_thread().name
        results[name] = model(x)
        if name == "first":
            first_left.set()

    handle = layers_of(model)["first"].base_layer.register_forward_hook(wait)
    threads = {name: threading.Thread(target=run, name=name) for name in inside}
    with model.disable_adapter():
        threads["first"].start()
        inside["first"].wait(2)
        threads["second"].start()
        for thread in threads.values():
            thread.join()
    handle.remove()
    assert all(torch.equal(results[name], expected) for name in inside)
    assert base_bytes(model) == merged
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())


# --- forwards put over a layer's own --------------------------------------------------------------------------------


LAYERS = ["conv", "norm", "linear", "conv1d"]


def every_kind() -> nn.Module:
    """A layer of each kind, one after the other."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 4, 2), nn.LayerNorm(5), nn.Linear(5, 6), Conv1D(7, 6))
    model = nn.Sequential(OrderedDict(zip(LAYERS, layers, strict=True)))
    for parameter in model.parameters():
        parameter.data.add_(normal(*parameter.shape, seed=3))
    return model.eval()


def twice(layer: Any, x: Tensor) -> Tensor:
    return 2 * type(layer).forward(layer, x)


def by_accelerate(layer: Any) -> None:
    add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu", io_same_device=True))


def by_two_of_accelerate(layer: Any) -> None:
    by_accelerate(layer)
    add_hook_to_module(layer, ModelHook(), append=True)


def by_method(layer: Any) -> None:
    layer.forward = MethodType(twice, layer)


def by_partial(layer: Any) -> None:
    def scaled(layer: Any, factor: float, x: Tensor, shift: float) -> Tensor:
        return factor * type(layer).forward(layer, x) + shift

    layer.forward = partial(scaled, layer, 3.0, shift=0.5)


def by_method_within_accelerate(layer: Any) -> None:
    by_method(layer)
    by_accelerate(layer)


WAYS: list[Callable[[Any], None]] = [
    by_accelerate,
    by_two_of_accelerate,
    by_method,
    by_partial,
    by_method_within_accelerate,
]


@pytest.mark.parametrize("late", [False, True], ids=["before", "after-merging"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", LAYERS)
def test_disabled_while_merged_whatever_forward_the_layer_has(kind: str, way: Callable[[Any], None], late: bool):
    base, original, x = every_kind(), every_kind(), normal(2, 3, 3, 6)
    way(original.get_submodule(kind))
    if not late:
        way(base.get_submodule(kind))
    model = adapted(base, bias="with_norms")
    assert set(layers_of(model)) == set(LAYERS)
    model.merge_adapter()
    if late:
        way(layers_of(model)[kind].base_layer)
    merged, changed = base_bytes(model), model(x)
    with model.disable_adapter():
        assert torch.equal(model(x), original(x))
    assert not torch.allclose(changed, original(x))
    assert torch.equal(model(x), changed)
    assert base_bytes(model) == merged


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_copy_of_a_layer_is_independent_of_it(kind: str, way: Callable[[Any], None]):
    layer: Any = every_kind().get_submodule(kind)
    x = {"conv": normal(2, 3, 3, 6), "conv1d": normal(2, 6)}.get(kind, normal(2, 5))
    way(layer)
    before, names = layer(x), {name: id(held) for name, held in vars(layer).items()}
    trial = independent_copy(layer)
    assert torch.equal(trial(x), before)
    trial.weight.zero_()
    trial.bias.fill_(0.25)
    without = {by_method: 0.5, by_partial: 1.25, by_method_within_accelerate: 0.5}.get(way, 0.25)
    assert torch.equal(trial(x), torch.full_like(before, without))
    assert torch.equal(layer(x), before)
    assert {name: id(held) for name, held in vars(layer).items()} == names


def test_what_is_not_bound_to_the_layer_stays_as_it_is():
    layer, other = nn.Linear(3, 3), nn.Linear(3, 3)
    layer.of_another, layer.partial_of_another = other.forward, partial(twice, other)
    layer.without_arguments, layer.later_argument = partial(normal, seed=2), partial(twice, other, layer)
    trial = independent_copy(layer)
    for name in ("of_another", "partial_of_another", "without_arguments", "later_argument"):
        assert getattr(trial, name) is getattr(layer, name)


def test_disabled_while_merged_after_a_hook_of_accelerate_was_removed():
    model, x = adapted(every_kind(), bias="with_norms"), normal(2, 3, 3, 6)
    layer = layers_of(model)["linear"].base_layer
    model.merge_adapter()
    by_accelerate(layer)
    remove_hook_from_module(layer)
    assert layer.forward.__self__ is layer  # it leaves a bound method behind
    assert "forward" in vars(layer)
    with model.disable_adapter():
        assert torch.equal(model(x), every_kind()(x))


# --- what rounding swallows -----------------------------------------------------------------------------------------


def lost_changes(model: Any, names: list[str]) -> tuple[int, int]:
    """Changes that leave the stored number as it was, and all changes."""
    lost = total = 0
    for layer in layers_of(model).values():
        for name in names:
            pairs = [(layer.base_layer.weight.detach(), dense_change(layer, name).float())]
            if name in layer.fps_bias:
                pairs.append((layer.base_layer.bias.detach(), layer.fps_bias[name].detach().float()))
            for stored, change in pairs:
                after = (stored.float() + change).to(stored.dtype)
                total += int((change != 0).sum())
                lost += int(((change != 0) & (after == stored)).sum())
    return lost, total


@pytest.mark.parametrize("scale", [3e-4, 1e-4, 1e-6])
@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
def test_changes_lost_in_bfloat16_are_counted(scale: float, method: str):
    model = adapted(tiny_vit().bfloat16())
    fill(model, scale=scale)
    lost, total = lost_changes(model, ["default"])
    assert 0.01 * total < lost <= total
    with pytest.warns(
        UserWarning, match=rf"lost {lost:,} of {total:,} changes \({lost / total:.1%}\).*bfloat16.*float32"
    ):
        getattr(model, method)()


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1e-3), (torch.bfloat16, 1.0)], ids=["float32", "large"])
def test_no_warning_where_hardly_anything_is_lost(dtype: torch.dtype, scale: float):
    model = adapted(tiny_vit().to(dtype))
    fill(model, scale=scale)
    lost, total = lost_changes(model, ["default"])
    assert lost <= 0.01 * total
    model.merge_adapter()


def test_no_warning_for_an_untrained_adapter():
    adapted(tiny_vit().bfloat16(), filled=False).merge_adapter()


def test_losses_of_an_earlier_merge_are_not_reported_again():
    model = adapted(tiny_mlp().bfloat16(), "a")
    model.add_adapter("b", config())
    fill(model, "a", scale=1e-6)
    fill(model, "b", scale=10.0)
    with pytest.warns(UserWarning, match="Merging lost"):
        model.merge_adapter(["a"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="Already following adapters")
        model.merge_adapter(["a", "b"])


def test_training_a_merged_model_does_not_use_the_adapter():
    model, x = adapted(tiny_mlp()), normal(3, 10)
    model.merge_adapter()
    merged = model(x)
    fill(model, seed=7)
    assert torch.equal(model(x), merged)
