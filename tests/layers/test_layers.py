"""Wrapped layers compute what a plain layer with W + ΔW and b + Δb computes, wherever they are put."""

import copy
from collections import OrderedDict
from collections.abc import Callable
from types import MethodType
from typing import Any

import peft
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_fps.layers.layer_types import layer_class
from tests.layers.comparisons import (
    COMPILES,
    HOOKED,
    activate,
    assert_adapter_gradients,
    compiled_alike,
    hook_base_layers,
    several_adapters,
)
from tests.support.helpers import (
    COPIES,
    adapted,
    assert_threads_do_not_mix,
    base_bytes,
    config,
    dense_reference,
    fill,
    image_batches,
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
)


def single(layer: nn.Module) -> Any:
    """A model of one layer, with weights and biases of a common size, the same at every call."""
    with torch.no_grad():
        for seed, parameter in enumerate(layer.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=seed))
    return nn.Sequential(OrderedDict(layer=layer)).eval()


def reference(model: Any, *adapters: str) -> nn.Module:
    """A plain model with the changes of the adapters (the default one if none is named)."""
    base = copy.deepcopy(model).unload()
    return dense_reference(base, model, list(adapters) or ["default"])


def assert_like_reference(model: Any, *inputs: Tensor, adapters: tuple[str, ...] = ()) -> None:
    """The same output, and the same gradient of the input where it takes one."""
    plain = reference(model, *adapters)
    ours = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    theirs = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    result, expected = output(model, *ours), output(plain, *theirs)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    if not any(x.requires_grad for x in ours):
        return
    grad = normal(*expected.shape, seed=8).to(expected.dtype)
    result.backward(grad)
    expected.backward(grad)
    for one, other in zip(ours, theirs, strict=True):
        if one.is_floating_point():
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-5)


def assert_gradients_like_reference(model: Any, x: Tensor) -> None:
    """Gradients of values and bias deltas are those of the dense weight in float64 at the selected entries."""
    plain = reference(model).double().requires_grad_()
    expected = output(plain, x.double())
    grad = normal(*expected.shape, seed=8)
    expected.backward(grad.double())
    model.zero_grad()
    output(model, x).backward(grad.to(x.dtype))
    assert_adapter_gradients(model, plain, rtol=1e-4, atol=1e-5)


def conv(*args: Any, **options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Conv2d(*args, **options)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = (
    {
        "linear": (lambda: nn.Linear(6, 5), (3, 6)),
        "linear-no-bias": (lambda: nn.Linear(6, 5, bias=False), (3, 6)),
        "linear-1d": (lambda: nn.Linear(6, 5), (6,)),
        "linear-3d": (lambda: nn.Linear(6, 5), (2, 3, 6)),
        "linear-4d": (lambda: nn.Linear(6, 5), (2, 4, 3, 6)),
        "conv1d": (lambda: Conv1D(5, 6), (2, 3, 6)),
        "conv1d-2d": (lambda: Conv1D(5, 6), (3, 6)),
        "conv": (conv(4, 6, 3), (2, 4, 7, 6)),
        "conv-no-bias": (conv(4, 6, 3, bias=False), (2, 4, 7, 6)),
        "conv-image": (conv(4, 6, 3), (4, 7, 6)),
        "conv-stride": (conv(4, 6, (3, 2), stride=(2, 3), padding=(2, 1)), (2, 4, 7, 6)),
        "conv-groups": (conv(4, 6, 3, groups=2, padding=1), (2, 4, 7, 6)),
        "conv-depthwise": (conv(4, 8, 3, groups=4), (2, 4, 7, 6)),
        "conv-dilation": (conv(4, 6, 2, dilation=(2, 3)), (2, 4, 7, 6)),
        "conv-same": (conv(4, 6, 3, padding="same", dilation=2), (2, 4, 7, 6)),
        "conv-same-even": (conv(4, 6, (2, 4), padding="same"), (2, 4, 7, 6)),
        "conv-valid": (conv(4, 6, 3, padding="valid"), (2, 4, 7, 6)),
    }
    | {
        f"conv-{mode}": (conv(4, 6, 3, padding=(1, 2), padding_mode=mode, stride=2), (2, 4, 7, 6))
        for mode in ("reflect", "replicate", "circular")
    }
    | {
        "conv-circular-same": (conv(4, 6, (2, 3), padding="same", padding_mode="circular"), (2, 4, 7, 6)),
        "sequence": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2), (2, 4, 9)),
        "sequence-same": (lambda: nn.Conv1d(4, 6, 4, padding="same", padding_mode="reflect"), (4, 9)),
        "sequence-no-examples": (lambda: nn.Conv1d(4, 6, 3), (0, 4, 9)),
        "volume": (lambda: nn.Conv3d(4, 6, (1, 2, 3), stride=(2, 1, 1), padding=1, groups=2), (2, 4, 3, 4, 5)),
        "spread-sequence": (lambda: nn.ConvTranspose1d(4, 6, 3, 2, 1, output_padding=1, groups=2), (2, 4, 5)),
        "spread": (lambda: nn.ConvTranspose2d(4, 6, (3, 2), (2, 3), (1, 0), groups=2, dilation=(1, 2)), (2, 4, 5, 4)),
        "spread-image": (lambda: nn.ConvTranspose2d(4, 6, 2, stride=2, bias=False), (4, 3, 3)),
        "spread-volume": (lambda: nn.ConvTranspose3d(2, 4, 2, stride=2), (1, 2, 2, 3, 2)),
    }
)

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


@pytest.fixture(params=list(LAYERS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def wrapped(kind: str, hooked: bool = False, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, Tensor]:
    build, shape = LAYERS[kind]
    model = adapted(single(build()).to(dtype), **{"target_modules": ["layer"], "per_neuron": 3} | options)
    if hooked:
        hook_base_layers(model)
    return model, normal(*shape, seed=5, dtype=dtype)


# --- the product ----------------------------------------------------------------------------------------------------


@HOOKED
def test_outputs_and_all_gradients_equal_those_of_a_dense_layer(kind: str, hooked: bool):
    model, x = wrapped(kind, hooked)
    assert_like_reference(model, x)
    assert_gradients_like_reference(model, x)
    base = layers_of(model)["layer"].base_layer
    assert base.weight.grad is None
    assert not base.weight.requires_grad


def test_features_as_peft_expects_them():
    for kind, expected in (("linear", (6, 5)), ("conv1d", (6, 5)), ("conv", (4, 6))):
        layer = layers_of(wrapped(kind)[0])["layer"]
        assert (layer.in_features, layer.out_features) == expected


def test_a_base_layer_with_something_of_its_own(kind: str):
    """Hooks make the base layer run as it is; its result is scaled by one of them."""
    model, x = wrapped(kind)
    expected = reference(model)(x) + reference(model).layer.forward(x) * 0
    base_output = copy.deepcopy(model).unload()(x)
    layer = layers_of(model)["layer"]
    layer.base_layer.register_forward_hook(lambda module, args, output: 3 * output)
    torch.testing.assert_close(model(x), expected + 2 * base_output, rtol=1e-5, atol=1e-5)


@given(st.sampled_from(["linear", "conv1d", "conv-groups"]), st.integers(0, 80), st.sampled_from(["none", "all"]))
def test_any_number_of_entries(kind: str, k: int, bias: str):
    if k == 0 and bias == "none":
        return
    model, x = wrapped(kind, per_neuron=k, bias=bias, granularity="layer")
    assert_like_reference(model, x)


def test_bias_deltas():
    model, x = wrapped("linear", per_neuron=0)
    base = copy.deepcopy(model).unload()
    delta = layers_of(model)["layer"].fps_bias["default"]
    assert delta.shape == (5,)
    torch.testing.assert_close(model(x), base(x) + delta)
    for kind in ("linear-no-bias", "conv-no-bias"):
        assert not layers_of(wrapped(kind)[0])["layer"].fps_bias
    assert not layers_of(wrapped("linear", bias="none")[0])["layer"].fps_bias


@pytest.mark.parametrize(
    ("build", "inputs"),
    [
        (tiny_vit, images()),
        (tiny_conv, images()),
        (tiny_gpt2, tokens()),
        (tiny_bert, tokens()),
        (tiny_llama, tokens()),
    ],
    ids=["vit", "conv", "gpt2", "bert", "llama"],
)
def test_whole_models(build: Callable[[], nn.Module], inputs: Tensor):
    model, x = adapted(build(), modules_to_save=[]), inputs.to(torch.get_default_device())
    assert_like_reference(model, x)
    base = build()
    expected = output(dense_reference(base, model, ["default"]), x)
    torch.testing.assert_close(output(model, x), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, output(base, x), atol=1e-3)


# --- several adapters -----------------------------------------------------------------------------------------------


def with_three(build: Callable[[], nn.Module] = tiny_mlp) -> Any:
    """Overlapping adapters, one of them on a part of the modules and without biases."""
    part = ["first"] if build is tiny_mlp else ["grouped"]
    last = {"per_neuron": 3, "bias": "none", "target_modules": part, "importance": "random"}
    return several_adapters(build(), {"a": {"per_neuron": 4}, "b": {"per_neuron": 6}, "c": last}, modules_to_save=[])


@pytest.mark.parametrize("names", [("a",), ("b",), ("c",), ("a", "b"), ("b", "c", "a"), ("c", "a")], ids="+".join)
def test_active_adapters_are_summed(names: tuple[str, ...]):
    model = with_three()
    activate(model, *names)
    assert_like_reference(model, normal(3, 10), adapters=names)


def test_gradients_of_summed_adapters():
    model, x = with_three(), normal(3, 10)
    activate(model, "a", "b")
    model(x).square().sum().backward()
    plain = reference(model, "a", "b").requires_grad_()
    plain(x).square().sum().backward()
    assert_adapter_gradients(model, plain, "a", "b", rtol=1e-4, atol=1e-5)
    assert layers_of(model)["first"].fps_values["c"].grad is None


def test_switching_disabling_and_deleting():
    model, x = with_three(), normal(3, 10)
    base = tiny_mlp()(x)
    expected = {names: reference(model, *names)(x) for names in ("a", "b", "ab")}
    for names in ("a", "b", "ab", "b", "a"):
        activate(model, *names)
        torch.testing.assert_close(model(x), expected[names], rtol=1e-5, atol=1e-5)
        with model.disable_adapter():
            assert torch.equal(model(x), base)
    activate(model, "a", "b")
    model.delete_adapter("b")
    torch.testing.assert_close(model(x), expected["a"], rtol=1e-5, atol=1e-5)
    assert set(layers_of(model)["first"].fps_values) == {"a", "c"}
    assert not [name for name, _ in model.named_parameters() if name.endswith(".b")]
    assert not [name for name, _ in model.named_buffers() if name.endswith(".b")]


def test_new_values_of_summed_adapters_are_seen_at_once():
    model, x = with_three(), normal(3, 10)
    activate(model, "a", "b")
    for seed in (5, 6):
        fill(model, "b", seed=seed)
        torch.testing.assert_close(model(x), reference(model, "a", "b")(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("names", [("a",), ("a", "b")], ids="+".join)
@HOOKED
def test_training_after_evaluation_in_inference_mode(names: tuple[str, ...], hooked: bool):
    model, x = with_three(tiny_conv), images()
    if hooked:
        hook_base_layers(model)
    activate(model, *names)
    with torch.inference_mode():
        before = model(x)
    after = model.train()(x)
    after.sum().backward()
    torch.testing.assert_close(after, before)


def test_a_model_that_is_built_in_inference_mode():
    expected = adapted(tiny_mlp())(normal(3, 10))
    with torch.inference_mode():
        # few tokens and no gradients: ΔW is multiplied beside W, which rounds in another order
        torch.testing.assert_close(adapted(tiny_mlp())(normal(3, 10)), expected)


def test_values_of_both_adapters_at_one_entry_are_added():
    model = adapted(single(nn.Linear(2, 1, bias=False)), "a", target_modules=["layer"], per_neuron=2)
    model.add_adapter("b", config(per_neuron=2, target_modules=["layer"]))
    layer = layers_of(model)["layer"]
    layer.fps_values["a"].data = torch.tensor([1.0, 10.0])
    layer.fps_values["b"].data = torch.tensor([100.0, 1000.0])
    activate(model, "a", "b")
    base = layer.base_layer.weight[0]
    assert model(torch.eye(2))[:, 0].tolist() == [float(base[0] + 101), float(base[1] + 1010)]


# --- frozen bytes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [tiny_mlp, tiny_conv], ids=["mlp", "conv"])
def test_base_weights_never_change(build: Callable[[], nn.Module]):
    model = with_three(build) if build is tiny_mlp else adapted(build())
    x = normal(3, 10) if build is tiny_mlp else images()
    before = base_bytes(model)
    names = list(model.peft_config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for training in (True, False):
        model.train(training)
        for name in names:
            model.set_adapter(name)
            model(x).sum().backward()
            optimizer.step()
            with model.disable_adapter():
                model(x)
    activate(model, *names)
    model(x)
    assert base_bytes(model) == before
    assert all(not layer.base_layer.weight.requires_grad for layer in layers_of(model).values())


# --- precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv-groups", "linear-4d"])
@HOOKED
def test_autocast(kind: str, hooked: bool):
    model, x = wrapped(kind, hooked)
    expected = reference(model)(x)
    x.requires_grad_()
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        result = model(x)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), expected, rtol=0.05, atol=0.2)
    trained = [*layers_of(model)["layer"].adapter_parameters("default"), x]
    assert len(trained) == 3  # values, biases, and the input
    halves = torch.autograd.grad(result.float().square().sum(), trained)
    fulls = torch.autograd.grad(model(x).square().sum(), trained)
    for half, full in zip(halves, fulls, strict=True):
        assert half.dtype == torch.float32
        assert float((half - full).norm() / full.norm()) < 0.05


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@HOOKED
def test_half_models_keep_float32_changes(kind: str, dtype: torch.dtype, hooked: bool):
    model, x = wrapped(kind, hooked, dtype, per_neuron=2)
    layer = layers_of(model)["layer"]
    plain = dense_reference(copy.deepcopy(model).unload().float(), model, ["default"])
    result = model(x)
    assert result.dtype == dtype
    torch.testing.assert_close(result.float(), plain(x.float()), rtol=0.05, atol=0.1)
    result.sum().backward()
    assert layer.fps_values["default"].dtype == layer.fps_values["default"].grad.dtype == torch.float32
    assert layer.fps_columns["default"].dtype == torch.int32


def test_double_precision_models():
    model = adapted(tiny_mlp().double())
    x = normal(3, 10, dtype=torch.float64)
    torch.testing.assert_close(model(x), reference(model)(x), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_gradient_checkpointing_gives_the_same_gradients():
    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        model = adapted(tiny_vit())
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        model(**image_batches(1)[0]).logits.square().sum().backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert set(plain) == set(checkpointed)
    assert sum("fps_values" in name for name in plain) == 13
    for name, grad in plain.items():
        torch.testing.assert_close(checkpointed[name], grad)


def test_channels_last():
    model, x = adapted(tiny_conv()), images()
    expected = reference(model)(x)
    model.to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last)
    stem = layers_of(model)["stem"].base_layer
    assert stem.weight.is_contiguous(memory_format=torch.channels_last)
    before = base_bytes(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    model(x).sum().backward()
    assert base_bytes(model) == before
    assert stem.weight.is_contiguous(memory_format=torch.channels_last)


# --- what else may be done to a base layer --------------------------------------------------------------------------


@pytest.mark.parametrize("hook", ["forward", "pre", "backward", "backward-pre"])
@pytest.mark.parametrize("kind", ["linear", "linear-4d", "conv1d", "conv", "conv-image"])
def test_hooks_of_base_layers_run(kind: str, hook: str):
    model, x = wrapped(kind)
    base, ran = layers_of(model)["layer"].base_layer, []
    register = {
        "forward": base.register_forward_hook,
        "pre": base.register_forward_pre_hook,
        "backward": base.register_full_backward_hook,
        "backward-pre": base.register_full_backward_pre_hook,
    }[hook]
    register(lambda module, *tensors: ran.append(module))
    expected = reference(model)(x)
    ran.clear()
    result = model(x.clone().requires_grad_())
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    result.sum().backward()
    assert ran == [base]


@pytest.mark.parametrize("way", ["method", "closure", "accelerate"])
def test_a_forward_put_over_the_base_layers_own(way: str):
    model, x = wrapped("linear")
    base, ran = layers_of(model)["layer"].base_layer, []
    expected = reference(model)(x)
    original = base.forward

    def replaced(*args: Any) -> Tensor:
        ran.append(way)
        return original(args[-1])

    class Noting(ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            ran.append(way)
            return args, kwargs

    if way == "accelerate":
        add_hook_to_module(base, Noting())
    else:
        base.forward = MethodType(replaced, base) if way == "method" else replaced
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert ran == [way]


def test_hooks_of_the_wrapped_layer_run():
    model, x = wrapped("linear")
    layer, ran = layers_of(model)["layer"], []
    layer.register_forward_hook(lambda module, args, output: ran.append(module))
    model(x)
    assert ran == [layer]


# --- copies, compilation, threads -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "bias"), [(tiny_mlp, "all"), (tiny_vit, "all"), (tiny_vit, "with_norms")], ids=["mlp", "vit", "norms"]
)
@pytest.mark.parametrize("way", COPIES)
def test_copies_are_independent(build: Callable[[], nn.Module], bias: str, way: str):
    model = adapted(build(), bias=bias)
    x = normal(3, 10) if build is tiny_mlp else images()
    expected = output(model, x)
    twin = COPIES[way](model)
    assert torch.equal(output(twin, x), expected)
    fill(twin, seed=9)
    before = base_bytes(model)
    twin.merge_adapter()
    assert torch.equal(output(model, x), expected)
    assert base_bytes(model) == before
    twin.unmerge_adapter()
    assert base_bytes(twin) == before


@COMPILES
@pytest.mark.parametrize("names", [("a",), ("a", "b")], ids="+".join)
def test_compiled_models_compute_the_same(names: tuple[str, ...]):
    model, x = with_three(), normal(3, 10)
    activate(model, *names)
    compiled = compiled_alike(model, x, backend="aot_eager")
    fill(model, "a", seed=5)
    torch.testing.assert_close(compiled(x), model(x))


@COMPILES
def test_a_whole_transformer_compiles_without_a_graph_break():
    model = adapted(tiny_vit(layers=1), per_neuron=3).train()
    compiled_alike(model, backend="aot_eager", pixel_values=images(2), labels=torch.tensor([0, 1]))


@pytest.mark.parametrize("names", [("a",), ("a", "b")], ids="+".join)
def test_forwards_in_two_threads(names: tuple[str, ...]):
    model = with_three()
    activate(model, *names)
    assert_threads_do_not_mix(model, [normal(50, 10, seed=seed) for seed in range(2)])


# --- places that need care ------------------------------------------------------------------------------------------


def encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(8), enable_nested_tensor=False).eval()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": ["linear1", "linear2"]}, ["linear1", "linear2"]),
        ({"target_modules": ["linear1"], "bias": "with_norms", "budget": 0}, ["linear1", "norm1", "norm2"]),
    ],
    ids=["linear", "norms"],
)
@pytest.mark.parametrize("gradients", [True, False])
def test_the_fused_path_of_transformer_encoders_shows_the_adapter(
    gradients: bool, options: dict[str, Any], expected: list[str]
):
    model, x = adapted(encoder(), **options), normal(2, 3, 8)
    last = {"norm"} if "bias" in options else set()
    assert set(layers_of(model)) == {f"layers.{i}.{name}" for i in range(2) for name in expected} | last
    plain = dense_reference(encoder(), model, ["default"])
    with torch.set_grad_enabled(gradients):
        torch.testing.assert_close(model(x), plain(x), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(model(x), encoder()(x), atol=1e-2)


def test_by_default_projections_of_attention_are_adapted_too():
    model = adapted(encoder())
    names = ("self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2")
    assert set(layers_of(model)) == {f"layers.{i}.{name}" for i in range(2) for name in names}


class Odd(nn.Module):
    """All that cannot carry an adapter, and something that can."""

    def __init__(self) -> None:
        super().__init__()
        self.fps_embedder = nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2, kdim=3)
        self.embedding = nn.Embedding(6, 4)
        self.norm = nn.LayerNorm(4)
        self.pairs = nn.Bilinear(4, 4, 1)
        self.tied = nn.Linear(4, 6, bias=False)
        self.tied.weight = self.embedding.weight
        self.good = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.good(x)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("fps_embedder", "contains 'fps_'.*exclude_modules"),
        ("attention.out_proj", "out_proj is read by torch.nn.MultiheadAttention without calling it"),
        ("attention", "Leave it out of target_modules, or use an implementation with linear layers"),
        ("norm", "is a LayerNorm, expected one of"),
        ("pairs", "is a Bilinear, expected one of"),
        ("tied", "same tensor as embedding.weight"),
    ],
)
def test_what_cannot_carry_an_adapter_is_refused(target: str, message: str):
    base = Odd()
    before = {name: type(module) for name, module in base.named_modules()}
    with pytest.raises(ValueError, match=rf"{target}.*{message}|{message}"):
        get_peft_model(base, config(target_modules=[target, "good"]))
    assert {name: type(module) for name, module in base.named_modules()} == before
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_a_weight_that_is_computed_from_others_is_refused():
    base = single(torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match=r"^layer: its weight is computed from other tensors .*exclude_modules"):
        adapted(base, target_modules=["layer"])


def test_a_module_under_two_names_is_refused():
    base = tiny_mlp()
    base.again = base.first
    with pytest.raises(ValueError, match="^first and again are the same module, expected a module with one name"):
        adapted(base)


def test_tied_output_embeddings_are_refused():
    with pytest.raises(ValueError, match="tied weights"):
        get_peft_model(tiny_gpt2(), config(target_modules=["lm_head"]))


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_layers_of_another_method_are_refused():
    low = peft.LoraConfig(target_modules=["first"])
    base = get_peft_model(tiny_mlp(), low, adapter_name="low").base_model.model
    with pytest.raises(ValueError, match="first already carries an adapter of another method"):
        get_peft_model(base, config(target_modules=["first"]))


def test_layer_class():
    assert [
        layer_class(module) is None
        for module in (nn.Linear(1, 1), Conv1D(1, 1), nn.Conv2d(1, 1, 1), nn.Embedding(1, 1))
    ] == [False] * 4
    assert layer_class(type("Other", (nn.Linear,), {})(1, 1)) is layer_class(nn.Linear(1, 1))
    assert layer_class(nn.EmbeddingBag(1, 1)) is None
