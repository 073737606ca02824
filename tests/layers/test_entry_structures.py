"""What a layer derives from its tensors follows them: in eager forwards, in compiled ones, and for tracers."""

import copy
import io
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, vmap

import peft_fps
from peft_fps import FPSConfig
from tests.layers.comparisons import activate, several_adapters
from tests.support.helpers import (
    adapted,
    fill,
    image_batches,
    images,
    layers_of,
    normal,
    output,
    tiny_conv,
    tiny_mlp,
    tiny_vit,
)


# both from within torch.compile, the second where a graph breaks at an error
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


small_vit = partial(tiny_vit, layers=1)
# for tests of what happens to every layer alike: tracing takes half a second for each
ONE_OF_VIT: dict[str, Any] = {"target_modules": ["q_proj"]}
ONE_OF_MLP: dict[str, Any] = {"target_modules": ["first"], "modules_to_save": ["last"]}


def assert_one_graph(model: nn.Module, inputs: dict[str, Tensor], backend: str = "eager") -> None:
    """The model, which has not run, compiles as a whole; results and gradients are those of an equal eager model."""
    eager = copy.deepcopy(model)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled: Any = torch.compile(model, backend=counter, fullgraph=True)
    found, expected = output(compiled, **inputs), output(eager, **inputs)
    torch.testing.assert_close(found, expected)
    if expected.requires_grad:
        found.square().sum().backward()
        expected.square().sum().backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        for name, parameter in eager.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


# --- torch.compile of a model that has not run ----------------------------------------------------------------------

MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]]]] = {
    "conv": (tiny_conv, lambda: {"x": normal(2, 3, 8, 8)}),
    "vit": (small_vit, lambda: {"pixel_values": images(2)}),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_cold_model_compiles_to_one_graph(kind: str) -> None:
    build, inputs = MODELS[kind]
    options: dict[str, Any] = {"bias": "with_norms", "target_modules": ["q_proj", "fc1"]} if kind == "vit" else {}
    model = adapted(build(), per_neuron=2, **options)
    assert_one_graph(model, inputs(), "aot_eager")


def test_inference_compiles_to_one_graph() -> None:
    with torch.inference_mode():
        assert_one_graph(adapted(tiny_conv()), {"x": normal(2, 3, 8, 8)})


def from_pretrained(folder: Path) -> nn.Module:
    adapted(small_vit(), importance="random", **ONE_OF_VIT).save_pretrained(folder)
    return PeftModel.from_pretrained(small_vit(), folder)


def transformers_load_adapter(folder: Path) -> nn.Module:
    adapted(small_vit(), importance="random", **ONE_OF_VIT).save_pretrained(folder)
    model = small_vit()
    model.load_adapter(folder)
    return model.eval()


@pytest.mark.parametrize("make", [from_pretrained, transformers_load_adapter], ids=lambda make: make.__name__)
def test_wherever_the_adapter_of_a_vit_comes_from(make: Callable[[Path], nn.Module], tmp_path: Path) -> None:
    assert_one_graph(make(tmp_path), {"pixel_values": images(2)})


def low_cpu_mem_usage(folder: Path) -> nn.Module:
    return PeftModel.from_pretrained(tiny_mlp(), folder, low_cpu_mem_usage=True)


def load_adapter(folder: Path) -> nn.Module:
    model = adapted(tiny_mlp(), "other", **ONE_OF_MLP)
    model.load_adapter(folder, "loaded")
    model.set_adapter("loaded")
    return model


def load_state_dict(folder: Path) -> nn.Module:
    model = adapted(tiny_mlp(), **ONE_OF_MLP)
    model.load_state_dict(PeftModel.from_pretrained(tiny_mlp(), folder).state_dict())
    return model


def hotswap(folder: Path) -> nn.Module:
    model = adapted(tiny_mlp(), **ONE_OF_MLP)
    peft_fps.hotswap_adapter(model, str(folder), "default")
    return model


def calibrated(folder: Path) -> nn.Module:
    model = get_peft_model(tiny_mlp(), FPSConfig(per_neuron=2, **ONE_OF_MLP)).eval()
    model.calibrate([{"x": normal(8, 10)}], progress=False)
    return model


def one_of_two_active_with_another(folder: Path) -> nn.Module:
    each = {"default": {}, "b": {"importance": "random", "per_neuron": 3}}
    model = several_adapters(tiny_mlp(), each, **ONE_OF_MLP | {"modules_to_save": []})
    activate(model, "default", "b")
    return model


@pytest.mark.parametrize(
    "make",
    [low_cpu_mem_usage, load_adapter, load_state_dict, hotswap, calibrated, one_of_two_active_with_another],
    ids=lambda make: make.__name__,
)
def test_wherever_the_adapter_comes_from(make: Callable[[Path], nn.Module], tmp_path: Path) -> None:
    adapted(tiny_mlp(), importance="random", **ONE_OF_MLP).save_pretrained(tmp_path)
    assert_one_graph(make(tmp_path), {"x": normal(3, 10)})


@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_compiled_model_warns_of_missing_calibration_once(fullgraph: bool) -> None:
    model = get_peft_model(tiny_mlp(), FPSConfig(per_neuron=2, target_modules=["first"])).train()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=fullgraph)
    with pytest.warns(UserWarning, match="trained without calibration") as caught:
        compiled(normal(3, 10))
    assert len([w for w in caught if "without calibration" in str(w.message)]) == 1
    torch._dynamo.reset()
    compiled(normal(3, 10))
    assert counter.frame_count == 2


@pytest.mark.parametrize("fullgraph", [True, False])
def test_an_adapter_that_was_never_loaded_is_refused(fullgraph: bool, tmp_path: Path) -> None:
    adapted(tiny_mlp()).save_pretrained(tmp_path)
    model = inject_adapter_in_model(FPSConfig.from_pretrained(str(tmp_path)), tiny_mlp())
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=fullgraph)
    kind = RuntimeError if fullgraph else ValueError  # of the compiler, which quotes ours
    with pytest.raises(kind, match="first: adapter 'default' was built from a saved config"):
        compiled(normal(3, 10))


def test_a_damaged_adapter_is_refused_before_a_graph_uses_it() -> None:
    model = adapted(tiny_mlp(), target_modules=["last"])
    layers_of(model)["last"].fps_columns["default"][:] = 99
    torch._dynamo.reset()
    with pytest.raises(ValueError, match="last: adapter 'default': fps_columns ranges over"):
        torch.compile(model, backend="eager")(normal(3, 10))


# --- after a model was compiled -------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [["a"], ["a", "b"]], ids="+".join)
@pytest.mark.parametrize("way", ["load_state_dict", "set_selection", "calibrate"])
def test_a_compiled_model_follows_new_entries(way: str, names: list[str]) -> None:
    def build(seed: int) -> Any:
        each = {"a": {"importance": "random", "seed": seed}, "b": {"per_neuron": 3}}
        model = several_adapters(tiny_mlp(), each, target_modules=["first"])
        activate(model, *names)
        return model

    model, other, x = build(0), build(1), normal(3, 10)
    torch._dynamo.reset()
    backend = "aot_eager" if way == "load_state_dict" else "eager"
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    before = compiled(x)
    if way == "load_state_dict":
        model.load_state_dict(other.state_dict())
    elif way == "set_selection":
        for path, layer in layers_of(model).items():
            source = layers_of(other)[path]
            layer.set_selection("a", source.fps_columns["a"], source.fps_row_counts["a"])
        fill(model, "a", seed=1)
    else:
        model.peft_config["a"].seed = 1
        model.calibrate(adapter_name="a", discard_values=True, progress=False)
        fill(model, "a", seed=1)
    torch.testing.assert_close(compiled(x), copy.deepcopy(model)(x))
    torch.testing.assert_close(compiled(x), other(x))
    assert not torch.allclose(before, compiled(x))


def test_a_compiled_model_refuses_what_is_loaded_damaged_and_goes_on_after_it_is_mended() -> None:
    model, x = adapted(tiny_mlp(), target_modules=["first"]), normal(3, 10)
    good = copy.deepcopy(model.state_dict())
    bad = copy.deepcopy(good)
    bad["base_model.model.first.fps_columns.default"].fill_(99)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    expected = compiled(x)
    model.load_state_dict(bad)
    for each in (compiled, model):
        with pytest.raises(ValueError, match="first: adapter 'default': fps_columns ranges over"):
            each(x)
    model.load_state_dict(good)
    torch.testing.assert_close(compiled(x), expected)


# --- other tracers --------------------------------------------------------------------------------------------------


def trace(model: nn.Module, x: Tensor) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".torch.jit")  # the category depends on the version of torch
        stream = io.BytesIO()
        torch.jit.save(torch.jit.trace(model, (x,)), stream)
        stream.seek(0)
        return torch.jit.load(stream)


def export(model: nn.Module, x: Tensor) -> Any:
    return torch.export.export(model, (x,), strict=False).module()


def export_strictly(model: nn.Module, x: Tensor) -> Any:
    return torch.export.export(model, (x,), strict=True).module()


@pytest.mark.parametrize("tracer", [trace, export, export_strictly], ids=lambda tracer: tracer.__name__)
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_traced_models_compute_the_same(tracer: Callable[[nn.Module, Tensor], Any], trained: bool) -> None:
    model = adapted(tiny_conv(), per_neuron=3).requires_grad_(trained)
    x = normal(2, 3, 8, 8)
    model(x)
    torch.testing.assert_close(tracer(model, x)(2 * x), model(2 * x))


@pytest.mark.parametrize("producer", [nn.LayerNorm(8), nn.GELU()], ids=repr)
def test_a_trace_with_gradients_is_the_same_twice(producer: nn.Module) -> None:
    """What produces a layer's input is noted for backward, which a trace has not. Torch traces twice and compares."""
    torch.manual_seed(0)
    net = nn.Sequential(OrderedDict(first=nn.Linear(4, 8), producer=producer, second=nn.Linear(8, 3)))
    model = adapted(net, per_neuron=2, modules_to_save=[])
    x = normal(2, 4).requires_grad_()
    model(x)
    torch.testing.assert_close(trace(model, x)(2 * x), model(2 * x))


@pytest.mark.parametrize("tracer", [trace, export, export_strictly], ids=lambda tracer: tracer.__name__)
def test_a_model_just_loaded_can_be_traced(tracer: Callable[[nn.Module, Tensor], Any], tmp_path: Path) -> None:
    adapted(tiny_mlp(), importance="random").save_pretrained(tmp_path)
    model, x = PeftModel.from_pretrained(tiny_mlp(), tmp_path), normal(3, 10)
    torch.testing.assert_close(tracer(model, x)(2 * x), model(2 * x))


def test_exported_models_of_several_adapters_write_to_places_that_onnx_takes() -> None:
    """ONNX scatters by int64 alone; an exporter passes the dtype of indices on."""
    each = {name: {"per_neuron": 3} for name in ("default", "other")}
    model = several_adapters(tiny_mlp(), each, modules_to_save=[])
    activate(model, *each)
    x = normal(3, 10)
    model(x)
    program = torch.export.export(model, (x,), strict=False)
    dtypes = [node.args[2].meta["val"].dtype for node in program.graph.nodes if "index_add" in str(node.target)]
    assert dtypes
    assert set(dtypes) == {torch.int64}


@pytest.mark.parametrize("names", [["default"], ["default", "other"]], ids=len)
@pytest.mark.parametrize("batched", [True, False])
def test_a_model_that_torch_func_uses_first_can_be_trained_afterwards(names: list[str], batched: bool) -> None:
    def loss(values: Any, x: Tensor) -> Tensor:
        return functional_call(model, values, (x,)).square().sum()

    model = several_adapters(tiny_mlp(), dict.fromkeys(names, {"per_neuron": 3}), modules_to_save=[]).eval()
    activate(model, *names)
    twin, x = copy.deepcopy(model), normal(3, 10)
    trained = {name: parameter.detach() for name, parameter in model.named_parameters() if "fps_" in name}
    found = vmap(grad(loss), (None, 0))(trained, x[:, None]) if batched else grad(loss)(trained, x)
    for each in (model, twin):
        each(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        if name in trained:
            expected = twin.get_parameter(name).grad
            assert torch.equal(parameter.grad, expected)
            torch.testing.assert_close(found[name].sum(0) if batched else found[name], expected)


@pytest.mark.parametrize("tracer", [trace, export], ids=lambda tracer: tracer.__name__)
def test_tracers_that_cannot_check_tensors_say_what_to_do(tracer: Callable[[nn.Module, Tensor], Any]) -> None:
    model = adapted(tiny_mlp())
    with pytest.raises(ValueError, match="first: adapter 'default' is traced before .* Run it once .* or merge it"):
        tracer(model, normal(3, 10))


# --- what is derived belongs to one model ---------------------------------------------------------------------------


def test_nothing_is_derived_before_it_is_needed() -> None:
    model = get_peft_model(small_vit(), FPSConfig(per_neuron=2))
    model.calibrate(image_batches(), progress=False)
    assert all(layer._derived["default"].known is None for layer in layers_of(model).values())


def test_copies_derive_anew() -> None:
    model, x = adapted(tiny_mlp()), normal(3, 10)
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(layer._derived["default"].known is None for layer in layers_of(twin).values())
        torch.testing.assert_close(twin(x), expected, rtol=0, atol=0)


def test_a_gradient_penalty_through_a_whole_model() -> None:
    model, x = adapted(small_vit(), per_neuron=2), images(2).requires_grad_()
    model.config._attn_implementation = "eager"  # torch's fused attention on the CPU has no second derivative
    dense = copy.deepcopy(model).merge_and_unload()
    found = []
    for each in (model, dense):
        (slope,) = torch.autograd.grad(each(pixel_values=x).logits.square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), x)[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
