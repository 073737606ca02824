"""Layers whose class has a forward of its own: trained, unmerged and merged, they are one and the same model."""

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import get_peft_model
from torch import Tensor, nn

from tests.support.helpers import (
    adapted,
    base_bytes,
    bits,
    config,
    dense_change,
    entry_places,
    layers_of,
    normal,
    selected_columns,
    unchanged,
)
from tests.support.own_forwards import Causal, Halved, Normalised, PadsFirst, Standardised, Times, Trimmed


class Switched(nn.Linear):
    """Takes something beside its input."""

    def forward(self, input: Tensor, factor: float) -> Tensor:
        return factor * F.linear(input, self.weight, self.bias)


class Remembers(nn.Linear):
    """Computes with a copy of its weight that was made before."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.copy = self.weight.detach().clone()

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.copy, self.bias)


class Around(nn.Module):
    def __init__(self, layer: nn.Module, *more: Any) -> None:
        super().__init__()
        self.layer, self.plain, self.more = layer, nn.Linear(6, 4), more

    def forward(self, x: Tensor) -> Tensor:
        found = self.layer(x, *self.more)
        return found if found.dim() > 2 else self.plain(F.pad(found, (0, 6 - found.shape[-1])))


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: Normalised(6, 5), (3, 6)),
    "conv1d": (lambda: Times(5, 6), (3, 6)),
    "standardised": (lambda: Standardised(4, 6, 3, padding=1, groups=2), (2, 4, 5, 6)),
    "pads": (lambda: PadsFirst(4, 6, (3, 2), stride=2, bias=False), (2, 4, 5, 6)),
    "causal": (lambda: Causal(4, 6, 3, dilation=2), (2, 4, 7)),
    "trimmed": (lambda: Trimmed(4, 6, 4, stride=2, groups=2), (2, 4, 7)),
    "halved": (lambda: Halved(4, 6, 3), (2, 4, 5, 6)),
}


def build(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer = make()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return Around(layer), normal(*shape)


def with_change(base: nn.Module, model: nn.Module) -> nn.Module:
    """The plain model with the change written into the weight that is called `layer`."""
    plain, layer = copy.deepcopy(base), layers_of(model)["layer"]
    with torch.no_grad():
        plain.layer.weight += dense_change(layer).to(plain.layer.weight.dtype)
        if "default" in layer.fps_bias:
            plain.layer.bias += layer.fps_bias["default"]
    return plain


@pytest.mark.parametrize("name", LAYERS)
def test_unmerged_merged_and_written_by_hand_are_one_model(name: str):
    base, x = build(name)
    model = adapted(copy.deepcopy(base), target_modules=["layer"])
    expected, before = with_change(base, model)(x), base_bytes(model)
    assert not torch.allclose(expected, base(x), atol=1e-2)
    torch.testing.assert_close(model(x), expected)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), base(x), rtol=0, atol=0)
    model.unmerge_adapter()
    assert base_bytes(model) == before
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_those_of_the_weight_at_the_entries(name: str):
    base, x = build(name)
    model = adapted(copy.deepcopy(base), target_modules=["layer"]).train()
    plain, layer = with_change(base, model), layers_of(model)["layer"]
    plain(x).square().sum().backward()
    model(x).square().sum().backward()
    places = torch.tensor(entry_places(plain.layer, selected_columns(layer)))
    expected = plain.layer.weight.grad.reshape(-1)[places]
    torch.testing.assert_close(layer.fps_values["default"].grad, expected, rtol=1e-4, atol=1e-5)
    if "default" in layer.fps_bias:
        torch.testing.assert_close(layer.fps_bias["default"].grad, plain.layer.bias.grad)
    assert all(parameter.grad is None for parameter in layer.base_layer.parameters())


def test_hooks_and_further_arguments_reach_the_layer():
    torch.manual_seed(0)
    base, x = Around(Switched(6, 5), 2.0), normal(3, 6)
    model = adapted(copy.deepcopy(base), target_modules=["layer"])
    layer, ran = layers_of(model)["layer"].base_layer, []

    class Noting(ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            ran.append("hook")
            return args, kwargs

    add_hook_to_module(layer, Noting())
    layer.register_forward_hook(lambda module, args, output: ran.append(bits(module.weight)))
    plain = with_change(base, model)
    torch.testing.assert_close(model(x), plain(x))
    assert ran == ["hook", bits(plain.layer.weight)]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # from within torch.compile
def test_a_layer_with_its_own_forward_compiles():
    base, x = build("standardised")
    model = adapted(base, target_modules=["layer"])
    expected = model(x)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="eager")(x), expected)


def test_half_precision_sums_are_those_of_a_merge():
    base, x = build("standardised")
    model = adapted(base.to(torch.bfloat16), target_modules=["layer"])
    before = model(x.bfloat16())
    model.merge_adapter()
    torch.testing.assert_close(model(x.bfloat16()), before, rtol=0, atol=0)


# --- forwards that do not follow their weight -----------------------------------------------------------------------


def test_what_does_not_follow_its_weight_is_left_out_with_a_warning():
    model = Around(Remembers(6, 5))
    with pytest.warns(UserWarning, match=r"1 of 2 layers.*layer: the forward of Remembers does not follow its weight"):
        adapter = get_peft_model(model, config())
    assert set(layers_of(adapter)) == {"plain"}


def test_what_cannot_be_tried_is_left_out_with_a_warning_and_taken_by_name():
    with pytest.warns(UserWarning, match=r"layer: the forward of Switched fails on an input alone"):
        model = get_peft_model(Around(Switched(6, 5), 2.0), config())
    assert set(layers_of(model)) == {"plain"}
    assert set(layers_of(adapted(Around(Switched(6, 5), 2.0), target_modules=["layer"]))) == {"layer"}


def test_what_does_not_follow_its_weight_is_refused_by_name():
    base = Around(Remembers(6, 5))
    with unchanged(base), pytest.raises(ValueError, match="layer: the forward of Remembers .*exclude_modules"):
        get_peft_model(base, config(target_modules=["layer"]))


COMPUTED: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: torch.nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)),
    "conv": lambda: torch.nn.utils.parametrizations.weight_norm(nn.Conv1d(6, 5, 3), dim=2),
    "transposed": lambda: torch.nn.utils.parametrizations.spectral_norm(nn.ConvTranspose1d(6, 5, 3)),
}


@pytest.mark.parametrize("kind", COMPUTED)
def test_computed_weights_are_left_out_with_a_warning_and_refused_by_name(kind: str):
    base = Around(COMPUTED[kind]())
    with unchanged(base), pytest.raises(ValueError, match=r"layer: its weight is computed from other tensors"):
        get_peft_model(base, config(target_modules=["layer"]))
    with pytest.warns(UserWarning, match=r"layer: its weight is computed from other tensors"):
        model = get_peft_model(base, config())
    assert set(layers_of(model)) == {"plain"}


def test_a_model_of_computed_weights_alone_is_refused_with_what_makes_them_parameters():
    base = nn.Sequential(COMPUTED["conv"](), COMPUTED["transposed"]())
    advice = (
        r"None of the 2 layers of Sequential .*0: its weight is computed .*remove_parametrizations\(module, 'weight'\)"
    )
    with unchanged(base), pytest.raises(ValueError, match=advice):
        get_peft_model(base, config())
    for layer in base:
        torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")
    assert set(layers_of(get_peft_model(base, config()))) == {"0", "1"}


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_the_older_weight_norm_is_named():
    base = Around(torch.nn.utils.weight_norm(nn.Conv1d(6, 5, 3)))
    with pytest.raises(
        ValueError, match=r"layer: its weight is computed .*torch\.nn\.utils\.remove_weight_norm\(module\)"
    ):
        get_peft_model(base, config(target_modules=["layer"]))


def test_a_product_that_is_put_over_one_layer_is_run():
    torch.manual_seed(0)
    base, x = Around(nn.Conv2d(3, 4, 3, padding=1)), normal(2, 3, 5, 5)

    def tiled(self: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(F.pad(input, (1, 1, 1, 1), mode="circular"), weight, bias)

    base.layer._conv_forward = MethodType(tiled, base.layer)
    model = adapted(base, target_modules=["layer"])
    expected = model(x)
    change = dense_change(layers_of(model)["layer"])
    bias = layers_of(model)["layer"].fps_bias["default"]
    padded = F.pad(x, (1, 1, 1, 1), mode="circular")
    torch.testing.assert_close(expected, base.layer.base_layer(x) + F.conv2d(padded, change.float(), bias))
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)


def test_trying_a_forward_leaves_layer_and_generators_alone():
    class Draws(Normalised):
        calls = 0

        def forward(self, input: Tensor) -> Tensor:
            type(self).calls += 1
            return super().forward(input) + 0 * torch.rand(())

    base = Around(Draws(6, 5))
    base.layer.register_forward_hook(lambda module, args, output: pytest.fail("hooks are the model's"))
    random, before = bits(torch.random.get_rng_state()), bits(base.layer.weight)
    get_peft_model(base, config())
    assert Draws.calls
    assert (bits(torch.random.get_rng_state()), bits(base.layer.weight)) == (random, before)


# --- what models read off their layers ------------------------------------------------------------------------------


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.linear = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Linear(4, 5)
        self.linear.rank_of_tokens = 7
        self.linear._private = 1


def test_attributes_that_the_wrapper_lacks_are_those_of_the_base_layer():
    model = adapted(Reads()).base_model.model
    convolution, linear = model.convolution, model.linear
    assert (convolution.stride, convolution.kernel_size, convolution.in_channels) == ((2, 2), (3, 3), 3)
    assert convolution.extra_repr() is not None
    assert (linear.in_features, linear.out_features, linear.rank_of_tokens) == (4, 5, 7)
    assert not hasattr(linear, "_private")  # the mark of somebody else on another module
    with pytest.raises(AttributeError, match="'Linear' object has no attribute 'nothing'"):
        linear.nothing  # noqa: B018
    assert copy.deepcopy(linear).rank_of_tokens == 7
