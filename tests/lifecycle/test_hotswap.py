"""A hot-swapped adapter computes, saves and behaves as if it had been loaded, and a failed swap changes nothing."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peft_fps
from tests.support.helpers import (
    adapted,
    base_bytes,
    bits,
    config,
    fill,
    images,
    layers_of,
    normal,
    output,
    selected_columns,
    through_transformers,
    tiny_conv,
    tiny_gpt2,
    tiny_mlp,
    tiny_vit,
    tokens,
    unchanged,
    with_fields,
)


pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "linear": (tiny_mlp, lambda: {"x": normal(3, 10)}, {}),
    "conv2d": (tiny_conv, lambda: {"x": normal(2, 3, 8, 8)}, {"modules_to_save": ["head"]}),
    "conv1d": (tiny_gpt2, lambda: {"input_ids": tokens(2)}, {}),
    "classifier": (tiny_vit, lambda: {"pixel_values": images(2)}, {}),
    "norms": (tiny_vit, lambda: {"pixel_values": images(2)}, {"bias": "with_norms"}),
}


def saved(folder: Path, build: Callable[[], nn.Module] = tiny_mlp, filled: int = 8, **options: Any) -> Path:
    """A folder with a trained adapter at random places."""
    model = adapted(build(), "other", **{"importance": "random", **options})
    fill(model, "other", seed=filled)
    for name, parameter in model.named_parameters():
        if ".modules_to_save." in name:
            parameter.data += normal(*parameter.shape, seed=filled)
    model.save_pretrained(folder)
    return folder / "other"


def loaded(folder: Path, build: Callable[[], nn.Module] = tiny_mlp) -> PeftModel:
    return PeftModel.from_pretrained(build(), folder)


# --- swaps ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("entries", [{}, {"per_neuron": 5}, {"per_neuron": 0.5}, {"granularity": "model"}])
def test_a_swapped_adapter_computes_and_is_saved_as_if_it_had_been_loaded(
    kind: str, entries: dict[str, Any], tmp_path: Path
) -> None:
    build, inputs, options = MODELS[kind]
    folder, model = saved(tmp_path, build, **options, **entries), adapted(build(), **options)
    before = base_bytes(model)
    output(model, **inputs())
    peft_fps.hotswap_adapter(model, str(folder), "default", torch_device="cpu")
    assert torch.equal(output(model, **inputs()), output(loaded(folder, build), **inputs()))
    assert base_bytes(model) == before
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    first, again = (json.loads((place / CONFIG).read_text()) for place in (folder, tmp_path / "again"))
    assert first["record"]["allocation"] == again["record"]["allocation"]
    assert {key for key in first if first[key] != again[key]} <= {"inference_mode"}


def test_parameters_stay_the_same_objects_and_as_trainable_as_they_were(tmp_path: Path) -> None:
    folder, model = saved(tmp_path, per_neuron=4), adapted(tiny_mlp())
    before = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    model(normal(3, 10)).sum().backward()
    peft_fps.hotswap_adapter(model, str(folder), "default")
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == before
    assert all(p.grad is None for p in model.parameters())
    model.train()(normal(3, 10)).sum().backward()
    assert all(
        layer.fps_values["default"].grad.shape == (4 * layer.shape.neurons,) for layer in layers_of(model).values()
    )


def test_tensors_of_the_same_size_stay_in_their_memory(tmp_path: Path) -> None:
    folder, model = saved(tmp_path), adapted(tiny_mlp())
    held = [layers_of(model)["first"].fps_values, layers_of(model)["first"].fps_columns]
    places = [each["default"].data_ptr() for each in held]
    peft_fps.hotswap_adapter(model, str(folder), "default")
    assert [each["default"].data_ptr() for each in held] == places


def test_other_adapters_stay_and_sums_follow(tmp_path: Path) -> None:
    folder, model, x = saved(tmp_path, per_neuron=3), adapted(tiny_mlp(), "a"), normal(3, 10)
    model.add_adapter("b", config())
    fill(model, "b", seed=2)
    model.base_model.set_adapter(["a", "b"])
    model(x)
    before = {name: bits(p) for name, p in model.named_parameters() if name.endswith(".b")}
    peft_fps.hotswap_adapter(model, str(folder), "a")
    assert {name: bits(p) for name, p in model.named_parameters() if name.endswith(".b")} == before
    twin = PeftModel.from_pretrained(tiny_mlp(), folder, adapter_name="a")
    twin.add_adapter("b", config())
    fill(twin, "b", seed=2)
    twin.base_model.set_adapter(["a", "b"])
    torch.testing.assert_close(model(x), twin(x))


def test_modules_that_the_saved_adapter_leaves_out_keep_no_changes(tmp_path: Path) -> None:
    folder, model, x = saved(tmp_path, target_modules=["last"]), adapted(tiny_mlp()), normal(3, 10)
    peft_fps.hotswap_adapter(model, str(folder), "default")
    assert selected_columns(layers_of(model)["first"]) == [[]] * 12
    assert torch.equal(model(x), loaded(folder)(x))
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(loaded(tmp_path / "again")(x), model(x))


def test_the_scale_is_one_again(tmp_path: Path) -> None:
    folder, model, x = saved(tmp_path), adapted(tiny_mlp()), normal(3, 10)
    model.set_scale("default", 0.5)
    peft_fps.hotswap_adapter(model, str(folder), "default")
    assert torch.equal(model(x), loaded(folder)(x))


def test_a_swap_in_inference_mode_and_one_over_tensors_made_there(tmp_path: Path) -> None:
    first, second = saved(tmp_path / "1", per_neuron=4), saved(tmp_path / "2", per_neuron=4, filled=5)
    model, x = adapted(tiny_mlp()), normal(3, 10)
    with torch.inference_mode():
        peft_fps.hotswap_adapter(model, str(first), "default")
        assert torch.equal(model(x), loaded(first)(x))
    layer = layers_of(model)["first"]
    with torch.inference_mode():
        layer.fps_columns["default"] = layer.fps_columns["default"].clone()
    peft_fps.hotswap_adapter(model, str(second), "default")
    assert torch.equal(model(x), loaded(second)(x))
    model.train()(x).sum().backward()


@pytest.mark.cpu
def test_a_wider_file_widens_the_adapter(tmp_path: Path) -> None:
    model = get_peft_model(tiny_mlp().to(torch.bfloat16), config(), autocast_adapter_dtype=False)
    fill(model)
    folder = saved(tmp_path)
    peft_fps.hotswap_adapter(model, str(folder), "default", check_base="warn")
    file = load_file(folder / WEIGHTS)
    assert torch.equal(layers_of(model)["first"].fps_values["default"], file["base_model.model.first.fps_values"])


@through_transformers
def test_adapters_of_a_transformers_model(tmp_path: Path) -> None:
    folder, model = saved(tmp_path, tiny_vit, per_neuron=3, modules_to_save=[]), tiny_vit()
    model.add_adapter(config(modules_to_save=[]), "default")
    fill(model)
    peft_fps.hotswap_adapter(model, str(folder), "default")
    expected = loaded(folder, tiny_vit)(pixel_values=images()).logits
    assert torch.equal(model.eval()(pixel_values=images()).logits, expected)


def test_an_adapter_that_waits_for_calibration_is_ready_after_the_swap(tmp_path: Path) -> None:
    folder, model = saved(tmp_path), get_peft_model(tiny_mlp(), peft_fps.FPSConfig(per_neuron=2))
    peft_fps.hotswap_adapter(model, str(folder), "default")
    model.train()(normal(3, 10)).sum().backward()  # would warn
    assert model.peft_config["default"].importance == "random"


# --- compiled models ------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # from within torch.compile
@pytest.mark.parametrize(
    ("kind", "backend", "in_place"),
    [
        ("linear", "eager", True),
        ("linear", "aot_eager", False),
        ("conv2d", "eager", False),
        ("classifier", "eager", False),
    ],
)
def test_a_compiled_model_gives_the_new_results(kind: str, backend: str, in_place: bool, tmp_path: Path) -> None:
    build, inputs, options = MODELS[kind]
    if kind == "classifier":
        build, options = partial(tiny_vit, layers=1), {"target_modules": ["fc1"]}
    folders = [
        saved(tmp_path / str(i), build, filled=i, **options, **entries)
        for i, entries in enumerate([{"seed": 3}, {"per_neuron": 4}])
    ]
    model = adapted(build(), **options)
    output(model, **inputs())
    torch._dynamo.reset()
    compiled: Any = model
    if in_place:
        model.compile(backend=backend)
    else:
        compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        output(compiled, **inputs())
        for folder in folders:
            peft_fps.hotswap_adapter(compiled, str(folder), "default")
            torch.testing.assert_close(output(compiled, **inputs()), output(loaded(folder, build), **inputs()))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # from within torch.compile
def test_a_compiled_sum_of_adapters_gives_the_new_results(tmp_path: Path) -> None:
    model, x = adapted(tiny_mlp(), "a"), normal(3, 10)
    model.add_adapter("b", config())
    fill(model, "b", seed=2)
    model.base_model.set_adapter(["a", "b"])
    model(x)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    before = compiled(x)
    peft_fps.hotswap_adapter(compiled, str(saved(tmp_path, per_neuron=3)), "a")
    torch.testing.assert_close(compiled(x), model(x))
    assert not torch.allclose(compiled(x), before)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # from within torch.compile
def test_swaps_of_the_same_structure_do_not_compile_anew(tmp_path: Path) -> None:
    folders = [saved(tmp_path / str(seed), filled=seed, importance="magnitude") for seed in (1, 2)]
    model, x = adapted(tiny_mlp()), normal(3, 10)
    model(x)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        compiled(x)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for folder in folders:
                peft_fps.hotswap_adapter(compiled, str(folder), "default")
                torch.testing.assert_close(compiled(x), loaded(folder)(x))


# --- errors; test_tampering.py has those of damaged files -----------------------------------------------------------


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    text = json.loads((folder / CONFIG).read_text())
    # or the damage would be noticed by its digest already
    (folder / CONFIG).write_text(json.dumps(with_fields(text, tensors_sha256=None)))


def _move_an_entry(tensors: dict[str, Tensor]) -> None:
    """From the first neuron of `last` to that of `first`, so that the total stays; both tensors are in order."""
    for name in ("fps_values", "fps_columns"):
        last, first = (f"base_model.model.{module}.{name}" for module in ("last", "first"))
        tensors[last] = tensors[last][1:].clone()
        tensors[first] = torch.cat([torch.zeros(1, dtype=tensors[first].dtype), tensors[first]])
    tensors["base_model.model.last.fps_row_counts"][0] -= 1
    tensors["base_model.model.first.fps_row_counts"][0] += 1


@pytest.mark.cpu
def test_a_split_over_modules_unlike_the_config_is_refused_by_swap_and_load(tmp_path: Path) -> None:
    """Also where the adapter's granularity leaves the split to the scores: the config says what they gave."""
    source = adapted(tiny_mlp(), granularity="model", importance="magnitude", per_neuron=2)
    for layer, columns in zip(layers_of(source).values(), ([1, 2], [0, 3]), strict=True):
        counts = torch.zeros(layer.shape.neurons, dtype=torch.int32)
        counts[0] = 2
        layer.set_selection("default", torch.tensor(columns), counts)
    source.save_pretrained(tmp_path)
    rewrite(tmp_path, _move_an_entry)
    model, message = adapted(tiny_mlp()), r"^first: fps_columns has 3 elements, expected 2 as the config says"
    with unchanged(model), pytest.raises(ValueError, match=message):
        peft_fps.hotswap_adapter(model, str(tmp_path), "default")
    base = tiny_mlp()
    with unchanged(base), pytest.raises(ValueError, match=message):
        loaded(tmp_path, lambda: base)
    source.load_adapter(str(tmp_path), "default")  # an adapter that has a selection takes another one's file
    assert selected_columns(layers_of(source)["first"])[0] == [0, 1, 2]


@pytest.mark.parametrize(("old", "new"), [([], ["classifier"]), (["classifier"], [])])
def test_heads_on_one_side_alone_are_refused(old: list[str], new: list[str], tmp_path: Path) -> None:
    folder, model = saved(tmp_path, tiny_vit, modules_to_save=new), adapted(tiny_vit(), modules_to_save=old)
    with (
        unchanged(model),
        pytest.raises(ValueError, match=r"trains .* whole \(modules_to_save\), expected .*load_adapter"),
    ):
        peft_fps.hotswap_adapter(model, str(folder), "default")


def test_modules_that_the_adapter_lacks_are_refused(tmp_path: Path) -> None:
    folder, model = saved(tmp_path), adapted(tiny_mlp(), target_modules=["last"])
    with unchanged(model), pytest.raises(ValueError, match=r"first: the saved adapter changes .*model.load_adapter"):
        peft_fps.hotswap_adapter(model, str(folder), "default")


def test_other_base_weights_are_refused_unless_allowed(tmp_path: Path) -> None:
    folder, other = saved(tmp_path), tiny_mlp()
    other.first.weight.data.add_(1)
    model = adapted(other)
    with unchanged(model), pytest.raises(ValueError, match="base weights: found fingerprint .*check_base='warn'"):
        peft_fps.hotswap_adapter(model, str(folder), "default")
    with pytest.warns(UserWarning, match="base weights: found fingerprint"):
        peft_fps.hotswap_adapter(model, str(folder), "default", check_base="warn")
    assert selected_columns(layers_of(model)["first"]) == selected_columns(layers_of(loaded(folder))["first"])


def test_a_merged_adapter_is_refused_and_another_merged_one_is_not(tmp_path: Path) -> None:
    folder, model = saved(tmp_path), adapted(tiny_mlp(), "a")
    model.add_adapter("b", config())
    fill(model, "b", seed=2)
    layers_of(model)["last"].merge(adapter_names=["a"])
    with unchanged(model), pytest.raises(ValueError, match=r"last: adapter 'a' is merged.*unmerge_adapter\(\)"):
        peft_fps.hotswap_adapter(model, str(folder), "a")
    peft_fps.hotswap_adapter(model, str(folder), "b")
    layers_of(model)["last"].unmerge()
    model.set_adapter("b")
    assert torch.equal(model(normal(3, 10)), loaded(folder)(normal(3, 10)))


def test_adapters_that_are_not_there_are_refused(tmp_path: Path) -> None:
    folder, model = saved(tmp_path), adapted(tiny_mlp())
    with pytest.raises(ValueError, match=r"no FPS adapter named 'b', expected one of \['default'\]"):
        peft_fps.hotswap_adapter(model, str(folder), "b")
    empty = get_peft_model(tiny_mlp(), config(), low_cpu_mem_usage=True)
    with pytest.raises(ValueError, match="first: adapter 'default' is on the meta device, expected loaded tensors"):
        peft_fps.hotswap_adapter(empty, str(folder), "default")


def test_adapters_of_other_methods_are_refused(tmp_path: Path) -> None:
    get_peft_model(tiny_mlp(), LoraConfig(target_modules=["first"])).save_pretrained(tmp_path)
    model = adapted(tiny_mlp())
    with unchanged(model), pytest.raises(ValueError, match="has a LoraConfig without saved entries"):
        peft_fps.hotswap_adapter(model, str(tmp_path), "default")
