"""All layers are merged, or unmerged, or none: whatever fails, and wherever."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from peft_fps import FPSConfig
from peft_fps.layers import entry_layer, layer_merge, merge_record, norm
from tests.support.helpers import (
    adapted,
    base_bytes,
    bits,
    config,
    fill,
    layers_of,
    normal,
    tiny_conv,
    tiny_mlp,
    tiny_vit,
    unchanged,
)


def with_two(build: Callable[[], nn.Module] = tiny_mlp, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    model = adapted(build().to(dtype), "a", modules_to_save=[], **options)
    model.add_adapter("b", config(per_neuron=3, modules_to_save=[], **options))
    fill(model, "b", seed=2, scale=0.7)
    return model.eval()


def merged_names(model: nn.Module) -> dict[str, tuple[list[str], list[str]]]:
    return {
        path: (list(layer.merged_adapters), sorted(layer.merge_records)) for path, layer in layers_of(model).items()
    }


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Exhausted(RuntimeError):
    """Stands for a device that is out of memory."""


@contextmanager
def failing(name: str, call: int) -> Iterator[None]:
    """Let the given call of a function of `peft_fps.layers.merge_record` fail before it does anything."""
    function, calls = getattr(merge_record, name), [0]

    def counted(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            raise Exhausted
        return function(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        for module in (merge_record, layer_merge, entry_layer, norm):
            if hasattr(module, name):
                patch.setattr(module, name, counted)
        yield


# --- a name twice ---------------------------------------------------------------------------------------------------


VERBS: dict[str, Callable[[Any], Any]] = {
    "merge_adapter": lambda model: model.merge_adapter(["a", "a"]),
    "safe merge": lambda model: model.merge_adapter(["b", "a", "b"], safe_merge=True),
    "merge_and_unload": lambda model: model.merge_and_unload(adapter_names=["a", "a"]),
    "layer": lambda model: layers_of(model)["last"].merge(adapter_names=["a", "a"]),
    "set_adapter": lambda model: model.base_model.set_adapter(["a", "a"]),
    "layer's set_adapter": lambda model: layers_of(model)["first"].set_adapter(["b", "b"]),
}


@pytest.mark.parametrize("merged", [[], ["a"]], ids=["", "merged"])
@pytest.mark.parametrize("verb", VERBS)
def test_a_name_twice_is_refused_and_nothing_changes(verb: str, merged: list[str]) -> None:
    model = with_two()
    original = base_bytes(model)
    if merged:
        model.merge_adapter(merged)
    before = merged_names(model), base_bytes(model)
    with unchanged(model), pytest.raises(ValueError, match=r"hold '[ab]' more than once, expected each name once"):
        VERBS[verb](model)
    assert (merged_names(model), base_bytes(model)) == before
    if merged:
        model.unmerge_adapter()
    assert base_bytes(model) == original


# --- failures half-way ----------------------------------------------------------------------------------------------


STEPS = [("add_to_bias", 1), ("add_to_bias", 2), ("add_to_bias", 4), ("_write", 3), ("sums", 3), ("_lost_changes", 5)]


@pytest.mark.parametrize(("name", "call"), STEPS, ids=str)
@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
def test_a_merge_that_fails_half_way_leaves_nothing_merged(method: str, name: str, call: int) -> None:
    model = with_two(tiny_conv, torch.float16, target_modules=["stem", "grouped", "head"])
    model(normal(1, 3, 8, 8, dtype=torch.float16))  # structures are derived before, which adapters keep
    with unchanged(model):
        with failing(name, call), pytest.raises(Exhausted):
            getattr(model, method)(adapter_names=["b", "a"])
        assert all(found == ([], []) for found in merged_names(model).values())
    assert len(layers_of(model)) == 3
    model.merge_adapter(["b", "a"])
    model.unmerge_adapter()


@pytest.mark.parametrize("call", [1, 2, 4])
def test_adapters_that_were_merged_before_stay_merged(call: int) -> None:
    model = with_two(tiny_vit, target_modules=["q_proj", "fc2"])
    original = base_bytes(model)
    model.merge_adapter(["a"])
    before = base_bytes(model)
    with failing("add_to_bias", call), pytest.raises(Exhausted), quiet():
        model.merge_adapter(["a", "b"])
    assert base_bytes(model) == before
    assert all(found == (["a"], ["a"]) for found in merged_names(model).values())
    model.unmerge_adapter()
    assert base_bytes(model) == original


def test_a_warning_that_is_an_error_leaves_nothing_merged() -> None:
    model = with_two(dtype=torch.bfloat16)
    fill(model, "a", scale=1e-6)
    with warnings.catch_warnings(), unchanged(model):
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="Merging lost"):
            model.merge_and_unload()
    assert all(found == ([], []) for found in merged_names(model).values())


@pytest.mark.parametrize("method", ["unmerge_adapter", "unload"])
@pytest.mark.parametrize("call", [1, 2, 5, 8])
def test_an_unmerge_that_fails_half_way_leaves_all_merged(method: str, call: int) -> None:
    model = with_two(tiny_vit, target_modules=["q_proj", "fc2"])
    original = base_bytes(model)
    model.merge_adapter(["b", "a"])
    fill(model, "a", seed=9)  # what was merged is put back, not what the adapters hold by now
    merged = base_bytes(model)
    name = "restore_entries" if call > 4 else "_overwrite"
    with failing(name, call), pytest.raises(Exhausted), unchanged(model):
        getattr(model, method)()
    assert base_bytes(model) == merged
    assert all(found == (["b", "a"], ["a", "b"]) for found in merged_names(model).values())
    model.unmerge_adapter()
    assert base_bytes(model) == original


def test_a_bias_that_cannot_be_restored_leaves_the_weight_merged() -> None:
    model = with_two()
    original = base_bytes(model)
    model.merge_adapter(["a"])
    layer = layers_of(model)["last"]
    merged, record = base_bytes(model), layer.merge_records["a"]
    layer.merge_records["a"] = merge_record.replace(record, bias=torch.zeros(3))
    with pytest.raises(RuntimeError):
        model.unmerge_adapter()
    assert base_bytes(model) == merged
    layer.merge_records["a"] = record
    model.unmerge_adapter()
    assert base_bytes(model) == original


def test_a_model_of_which_half_is_on_meta_is_refused_as_a_whole() -> None:
    model = with_two()
    layer = layers_of(model)["last"]
    weight = layer.base_layer.weight
    first = bits(layers_of(model)["first"].base_layer.weight)
    layer.base_layer.weight = nn.Parameter(weight.to("meta"), requires_grad=False)
    with pytest.raises(ValueError, match=r"last: its weight is on the meta device.*Nothing was changed"):
        model.merge_adapter(["a", "b"])
    assert bits(layers_of(model)["first"].base_layer.weight) == first
    assert all(found == ([], []) for found in merged_names(model).values())
    layer.base_layer.weight = weight
    model.merge_adapter(["a", "b"])
    merged = base_bytes(model)
    layer.base_layer.weight = nn.Parameter(weight.to("meta"), requires_grad=False)
    with pytest.raises(ValueError, match=r"last: its weight is on the meta device.*unmerge"):
        model.unmerge_adapter()
    layer.base_layer.weight = weight
    assert base_bytes(model) == merged
    assert all(found == (["a", "b"], ["a", "b"]) for found in merged_names(model).values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_model_that_was_cast_while_merged_is_unmerged_in_its_new_dtype(dtype: torch.dtype) -> None:
    model = with_two()
    expected = {path: layer.base_layer.weight.to(dtype) for path, layer in layers_of(model).items()}
    model.merge_adapter(["a", "b"])
    model.to(dtype).unmerge_adapter()
    for path, layer in layers_of(model).items():
        assert torch.equal(layer.base_layer.weight, expected[path])


# --- switching ------------------------------------------------------------------------------------------------------


def test_setting_an_adapter_unmerges_all_layers_or_none() -> None:
    model = with_two()
    original = base_bytes(model)
    model.merge_adapter(["a"])
    merged = base_bytes(model)
    with failing("_overwrite", 2), pytest.raises(Exhausted), quiet():
        model.set_adapter("b")
    assert base_bytes(model) == merged
    assert all(layer.active_adapters == ["a"] for layer in layers_of(model).values())
    with pytest.warns(UserWarning, match="Unmerging the model first") as told:
        model.set_adapter("b")
    assert len(told) == 1
    assert base_bytes(model) == original


def test_layers_merge_the_adapters_that_are_active_in_them() -> None:
    model = adapted(tiny_mlp(), "a", per_neuron=2)
    fill(model)
    model.add_adapter("b", FPSConfig(per_neuron=2, init_weights=False))
    for layer in layers_of(model).values():
        layer.set_adapter(["a", "b"])
    inputs = normal(3, 10)
    expected = model(inputs)
    model.merge_adapter()
    assert all(layer.merged_adapters == ["a", "b"] for layer in layers_of(model).values())
    torch.testing.assert_close(model(inputs), expected)
