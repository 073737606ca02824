"""Base layers whose weight is of a class of tensors that packs its numbers, from the start or since some later time.

optimum-quanto replaces the base layer by one of its own, torchao the weight within it. What is written into such a
weight in place is lost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune as prune
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_fps import FPSConfig
from tests.support.helpers import base_bytes, fill, layers_of, normal


SCALE = 1 / 64


class Packed(Tensor):
    """Numbers in eighths of a byte. All operations run on an unpacked copy, those in place too."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor) -> Packed:
        return Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=torch.float32)  # type: ignore[attr-defined]

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["numbers"], None

    @staticmethod
    def __tensor_unflatten__(tensors: dict[str, Tensor], *_: Any) -> Packed:
        return Packed(tensors["numbers"])

    def unpacked(self) -> Tensor:
        return self.numbers.float() * SCALE

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def plain(value: Any) -> Any:
            return value.unpacked() if isinstance(value, Packed) else value

        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return Packed(args[0].numbers)
        arguments = [[plain(each) for each in value] if isinstance(value, list) else plain(value) for value in args]
        return func(*arguments, **(kwargs or {}))


def packed(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(Packed((weight.detach() / SCALE).round().to(torch.int8)), requires_grad=False)


class PackedLinear(nn.Linear):
    """A layer of a quantising library, with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        weight: Any = self.weight
        return F.linear(x, weight.unpacked() if isinstance(weight, Packed) else weight, self.bias)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


def weight_within(owner: Any, name: str) -> None:
    """Quantise as torchao does."""
    getattr(owner, name).weight = packed(getattr(owner, name).weight)


def layer_replaced(owner: Any, name: str) -> None:
    """Quantise as optimum-quanto does."""
    old = getattr(owner, name)
    new = PackedLinear(old.in_features, old.out_features)
    new.weight, new.bias = packed(old.weight), old.bias
    setattr(owner, name, new)


Quantise = Callable[[Any, str], None]
WAYS = pytest.mark.parametrize("quantise", [weight_within, layer_replaced])


def adapter(base: nn.Module) -> PeftModel:
    model = get_peft_model(base, FPSConfig(per_neuron=2, importance="magnitude", modules_to_save=[]))
    fill(model)
    return model.eval()


def quantised_later(quantise: Quantise) -> PeftModel:
    model = adapter(Net())
    for layer in layers_of(model).values():
        quantise(layer, "base_layer")
    return model


def reference(model: PeftModel, x: Tensor) -> Tensor:
    """Unpacked weights with the dense change of each layer."""
    first, second = (partial_product(layer) for layer in (model.base_model.model.first, model.base_model.model.second))
    return second(first(x).relu())


def partial_product(layer: Any) -> Callable[[Tensor], Tensor]:
    dense = torch.zeros(layer.out_features, layer.in_features)
    start = 0
    for row, count in enumerate(layer.fps_row_counts["default"].tolist()):
        for place in range(start, start + count):
            dense[row, int(layer.fps_columns["default"][place])] = layer.fps_values["default"][place]
        start += count
    weight = layer.base_layer.weight.unpacked() + dense.detach()
    return lambda x: F.linear(x, weight, layer.base_layer.bias + layer.fps_bias["default"])


@WAYS
def test_what_is_quantised_after_the_adapter_was_attached_keeps_its_change(quantise: Quantise) -> None:
    model, x = quantised_later(quantise), normal(4, 8)
    with torch.no_grad():
        with model.disable_adapter():
            plain = model(x)
        torch.testing.assert_close(model(x), reference(model, x))
        assert (model(x) - plain).abs().max() > 0.1


def test_an_adapter_on_a_layer_that_packs_its_weight() -> None:
    base = Net()
    for name in ("first", "second"):
        layer_replaced(base, name)
    model, x = adapter(base), normal(4, 8)
    torch.testing.assert_close(model(x), reference(model, x))
    model(x).sum().backward()
    assert all(bool(layer.fps_values["default"].grad.any()) for layer in layers_of(model).values())


@WAYS
@pytest.mark.parametrize("verb", ["merge_adapter", "merge_and_unload"])
def test_nothing_is_merged_into_a_weight_in_which_it_would_be_lost(quantise: Quantise, verb: str) -> None:
    model, x = quantised_later(quantise), normal(4, 8)
    with torch.no_grad():
        before = model(x)
        with pytest.raises(ValueError, match=r"^first: its weight is a Packed, .* Nothing was merged\.$"):
            getattr(model, verb)()
        assert torch.equal(model(x), before)
    assert not any(layer.merged for layer in layers_of(model).values())


def test_one_layer_that_cannot_be_merged_keeps_all_from_it() -> None:
    model = adapter(Net())
    weight_within(layers_of(model)["second"], "base_layer")
    before = base_bytes(model.base_model.model.first)
    with pytest.raises(ValueError, match="^second: its weight is a Packed"):
        model.merge_adapter()
    assert base_bytes(model.base_model.model.first) == before


class Twice(PackedLinear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x)


def test_a_packed_weight_with_which_the_input_is_not_multiplied_is_refused() -> None:
    base = Net()
    layer_replaced(base, "first")
    base.first.__class__ = Twice
    with pytest.raises(ValueError, match="first.*the forward of Twice does not follow its weight"):
        get_peft_model(base, FPSConfig(per_neuron=2, target_modules=["first"]))


def pruned(layer: Any) -> None:
    prune.l1_unstructured(layer.base_layer, "weight", amount=3)


def normalised(layer: Any) -> None:
    nn.utils.parametrizations.weight_norm(layer.base_layer)


@pytest.mark.parametrize("change", [pruned, normalised])
@pytest.mark.parametrize("verb", ["merge_adapter", "merge_and_unload"])
def test_nothing_is_merged_into_a_weight_that_is_computed_since(change: Callable[[Any], None], verb: str) -> None:
    model, x = adapter(Net()), normal(4, 8)
    change(layers_of(model)["second"])
    before = model(x)
    with pytest.raises(ValueError, match=r"^second: its weight is computed from other tensors .* Nothing was merged"):
        getattr(model, verb)()
    assert torch.equal(model(x), before)


def test_what_was_merged_before_the_weight_was_packed_is_not_taken_out() -> None:
    model, x = adapter(Net()), normal(4, 8)
    model.merge_adapter()
    for layer in layers_of(model).values():
        layer_replaced(layer, "base_layer")
    before = model(x)
    with pytest.raises(ValueError, match=r"its weight is a Packed, .* Nothing was unmerged"):
        model.unmerge_adapter()
    assert all(layer.merged for layer in layers_of(model).values())
    assert torch.equal(model(x), before)
    with model.disable_adapter(), pytest.raises(ValueError, match=r"its weight is a Packed, .* Nothing was computed"):
        model(x)  # the base model is not to be had any more


class NoGradient(PackedLinear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


def test_a_base_layer_that_gives_no_gradient_is_refused_in_training() -> None:
    model = quantised_later(layer_replaced)
    layers_of(model)["second"].base_layer.__class__ = NoGradient
    with pytest.raises(ValueError, match=r"^second: .* gives no gradient to its input"):
        model(normal(4, 8))
    with torch.no_grad():
        torch.testing.assert_close(model(normal(4, 8)), reference(model, normal(4, 8)))
