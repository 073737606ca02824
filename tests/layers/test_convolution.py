"""Convolutions of every kind through an adapter's life, against a plain model with a dense W + ΔW."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peft_fps
from tests.layers.comparisons import (
    COMPILES,
    activate,
    assert_adapter_gradients,
    assert_equal,
    compiled_alike,
    several_adapters,
    trained_gradients,
)
from tests.support.helpers import (
    adapted,
    base_bytes,
    dense_reference,
    fill,
    layers_of,
    normal,
    tiny_codec,
    waves,
)


PATHS = {"encode", "decode", "widen", "volume"}


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def expected(model: Any, *names: str) -> nn.Module:
    return dense_reference(tiny_codec(), model, list(names))


# --- the life of an adapter -----------------------------------------------------------------------------------------


def test_all_kinds_are_default_targets_and_saved_merged_and_restored(tmp_path: Path) -> None:
    model, x = adapted(tiny_codec()), waves()
    assert set(layers_of(model)) == PATHS
    plain, before = expected(model, "default")(x), base_bytes(model)
    close(model(x), plain)
    assert not torch.allclose(plain, tiny_codec()(x), atol=1e-2)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_codec(), str(tmp_path)).eval()
    assert torch.equal(loaded(x), model(x))
    loaded.merge_adapter(safe_merge=True)
    close(loaded(x), plain)
    with loaded.disable_adapter():  # the call with an output size too
        assert torch.equal(loaded(x), tiny_codec()(x))
    loaded.unmerge_adapter()
    assert base_bytes(loaded) == before
    close(loaded.merge_and_unload()(x), plain)


def test_columns_of_a_transposed_convolution_are_channels_then_taps() -> None:
    """As the file format documents it: one entry of `(in channels, out channels / groups, kernel)`."""
    model = adapted(tiny_codec(), target_modules=["decode"], granularity="layer", per_neuron=0.25)
    layer = layers_of(model)["decode"]
    layer.set_selection("default", torch.tensor([7]), torch.tensor([0, 0, 0, 1]))
    layer.fps_values["default"].data.fill_(5.0)
    # neuron 3 is the second of group 1, which reads the channels 3 to 5; column 7 is its channel 2 at tap 1
    change = layer.get_delta_weight("default").detach()
    assert change.nonzero().tolist() == [[5, 1, 1]]
    assert float(change[5, 1, 1]) == 5.0


def test_training_gives_the_gradients_of_the_dense_weight() -> None:
    model, x = adapted(tiny_codec()), waves()
    plain = expected(model, "default").requires_grad_(True)
    plain(x).square().sum().backward()
    model(x).square().sum().backward()
    assert_adapter_gradients(model, plain, rtol=1e-4, atol=1e-5)


def test_several_adapters_and_mixed_batches() -> None:
    second = {"per_neuron": 4, "importance": "random"}
    model, x = several_adapters(tiny_codec(), {"a": {}, "b": second}, modules_to_save=[]), waves(3)
    parts = [expected(model, *names)(x) for names in ((), ("a",), ("b",), ("a", "b"))]
    activate(model, "a", "b")
    close(model(x), parts[3])
    mixed = model(x, adapter_names=["b", "__base__", "a"])
    close(mixed, torch.stack([parts[2][0], parts[0][1], parts[1][2]]))
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum", combination_type="linear")
    model.set_adapter("sum")
    close(model(x), parts[3])


def test_hot_swap(tmp_path: Path) -> None:
    model, other, x = adapted(tiny_codec()), adapted(tiny_codec(), filled=False), waves()
    fill(other, seed=7)
    other.save_pretrained(tmp_path)
    peft_fps.hotswap_adapter(model, str(tmp_path), "default")
    assert torch.equal(model(x), other(x))


# --- how it is run --------------------------------------------------------------------------------------------------


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model, x = adapted(tiny_codec()), waves().requires_grad_()
    model(x).square().sum().backward()
    wanted = trained_gradients(model)
    model.zero_grad()
    checkpoint(model, x, use_reentrant=False).square().sum().backward()
    assert_equal(trained_gradients(model), wanted)


def test_autocast() -> None:
    model, x = adapted(tiny_codec()), waves()
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        found = model(x)
        found.float().square().sum().backward()
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected(model, "default")(x), rtol=0.1, atol=0.1)
    assert all(layer.fps_values["default"].grad.dtype == torch.float32 for layer in layers_of(model).values())


@COMPILES
def test_compiled_gradients() -> None:
    compiled_alike(adapted(tiny_codec()), waves(), rtol=1e-4, atol=1e-5)


# --- what torch takes -----------------------------------------------------------------------------------------------


class Sized(nn.Module):
    """A transposed convolution that is asked for an output size, by place or by name."""

    def __init__(self, by_name: bool) -> None:
        super().__init__()
        self.layer, self.by_name = nn.ConvTranspose1d(4, 6, 3, stride=3, padding=1), by_name

    def forward(self, x: Tensor, size: list[int]) -> Tensor:
        return self.layer(x, output_size=size) if self.by_name else self.layer(x, size)


@pytest.mark.parametrize("hooked", [False, True], ids=["", "hooked"])
@pytest.mark.parametrize("by_name", [False, True], ids=["by-place", "by-name"])
def test_output_sizes(by_name: bool, hooked: bool) -> None:
    base, x = Sized(by_name), normal(2, 4, 5)
    model = adapted(copy.deepcopy(base), target_modules=["layer"])
    plain = dense_reference(base, model, ["default"])
    if hooked:
        layers_of(model)["layer"].base_layer.register_forward_hook(lambda module, args, output: None)
    for size in ([13], [14], [2, 6, 15]):
        wanted = plain(x, size)
        close(model(x, size), wanted)
        names = ["default", "__base__"]
        close(model(x, size, adapter_names=names), torch.stack([wanted[0], base(x, size)[1]]))
    model.merge_adapter()
    close(model(x, [14]), plain(x, [14]))
    with model.disable_adapter():
        assert torch.equal(model(x, [14]), base(x, [14]))
    with pytest.raises(ValueError, match="requested an output size"):
        model(x, [99])
