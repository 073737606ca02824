"""Saving and loading is the identity, through every door that PEFT and transformers have."""

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, GPT2LMHeadModel, ViTForImageClassification

from peft_fps import FPSConfig
from tests.support.helpers import (
    TinyMLP,
    adapted,
    bits,
    config,
    dense_change,
    dense_reference,
    fill,
    finish,
    images,
    layers_of,
    normal,
    start_python,
    tiny_bert,
    tiny_gpt2,
    tiny_mlp,
    tiny_vit,
    tokens,
    weighted_of,
)


pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TARGETS = ["projection", "q_proj", "fc2"]


def trained_vit(dtype: torch.dtype = torch.float32, autocast: bool = True, seed: int = 1, **options: Any) -> PeftModel:
    """A ViT with uneven rows, changed values, biases (those of norms too) and head."""
    options = {"granularity": "layer", "per_neuron": 2.3, "target_modules": TARGETS, "bias": "with_norms", **options}
    model = get_peft_model(tiny_vit().to(dtype), config(**options), autocast_adapter_dtype=autocast)
    fill(model, seed=seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter += normal(*parameter.shape, seed=seed).to(dtype)
    return model.eval()


def saved(model: PeftModel, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


Stored = Callable[..., tuple[PeftModel, Path]]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    """A `trained_vit` and the folder that it was saved to, made once for the same options; no test changes either."""
    made: dict[str, tuple[PeftModel, Path]] = {}

    def store(*arguments: Any, **options: Any) -> tuple[PeftModel, Path]:
        key = repr((arguments, options))
        if key not in made:
            model = trained_vit(*arguments, **options)
            made[key] = model, saved(model, tmp_path_factory.mktemp("stored"))
        return made[key]

    return store


def contents(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """Everything an adapter holds, by the path in the base model."""
    found = {}
    for path, layer in layers_of(model).items():
        if adapter in layer.fps_state:
            for name in layer.tensor_names():
                if adapter in getattr(layer, name):
                    found[f"{path}.{name}"] = getattr(layer, name)[adapter].detach()
    for path, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save:
            for name, parameter in module.modules_to_save[adapter].named_parameters():
                found[f"{path.removeprefix('base_model.model.')}.{name}"] = parameter.detach()
    return found


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name in expected:
        wider = torch.promote_types(found[name].dtype, expected[name].dtype)
        assert torch.equal(found[name].to(wider), expected[name].to(wider)), name


def logits(model: nn.Module) -> Tensor:
    dtype = next(parameter.dtype for name, parameter in model.named_parameters() if "layernorm" in name)
    with torch.no_grad():
        return model(pixel_values=images().to(dtype)).logits


# --- doors: each takes a base model and a folder, and returns a model with the adapter under a name, active ---------


def _from_pretrained(base: nn.Module, folder: Path, name: str, **options: Any) -> nn.Module:
    return PeftModel.from_pretrained(base, folder, adapter_name=name, **options)


def _second(base: nn.Module, folder: Path, name: str, **options: Any) -> nn.Module:
    model = adapted(base, "first", target_modules=["k_proj", "q_proj"], per_neuron=1)
    model.load_adapter(folder, name, **options)
    model.set_adapter(name)
    return model


def _into_existing(base: nn.Module, folder: Path, name: str) -> nn.Module:
    """What the Trainer does on resuming and with load_best_model_at_end."""
    model = PeftModel.from_pretrained(base, folder, adapter_name=name, is_trainable=True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.zero_()
    model.load_adapter(folder, name, is_trainable=True)
    return model.eval()


def _without_prefix(folder: Path) -> dict[str, Tensor]:
    return {key.removeprefix("base_model.model."): value for key, value in load_file(folder / WEIGHTS).items()}


def _inject(base: nn.Module, folder: Path, name: str, low_cpu_mem_usage: bool = False) -> nn.Module:
    model = inject_adapter_in_model(
        PeftConfig.from_pretrained(folder), base, name, low_cpu_mem_usage=low_cpu_mem_usage
    )
    set_peft_model_state_dict(model, _without_prefix(folder), name, low_cpu_mem_usage=low_cpu_mem_usage)
    return model.eval()


def _transformers(base: nn.Module, folder: Path, name: str) -> nn.Module:
    base.load_adapter(folder, name)
    return base


def _transformers_state_dict(base: nn.Module, folder: Path, name: str) -> nn.Module:
    base.load_adapter(
        adapter_state_dict=_without_prefix(folder), peft_config=PeftConfig.from_pretrained(folder), adapter_name=name
    )
    return base.eval()


def test_tensors_of_a_head_in_a_state_dict_name_no_target() -> None:
    source = adapted(tiny_bert())
    state = {key.removeprefix("base_model.model."): t for key, t in get_peft_model_state_dict(source).items()}
    assert "classifier.bias" in state
    model = inject_adapter_in_model(config(), tiny_bert(), state_dict=state)
    assert layers_of(model).keys() == layers_of(source).keys()


PEFT_DOORS: dict[str, Callable[[nn.Module, Path, str], nn.Module]] = {
    "from_pretrained": _from_pretrained,
    "from_pretrained low memory": lambda *args: _from_pretrained(*args, low_cpu_mem_usage=True),
    "from_pretrained with config": lambda base, folder, name: _from_pretrained(
        base, folder, name, config=PeftConfig.from_pretrained(folder)
    ),
    "load_adapter": _second,
    "load_adapter low memory": lambda *args: _second(*args, low_cpu_mem_usage=True),
    "load_adapter into existing": _into_existing,
    "inject": _inject,
    "inject low memory": lambda *args: _inject(*args, low_cpu_mem_usage=True),
}
TRANSFORMERS_DOORS: dict[str, Callable[[nn.Module, Path, str], nn.Module]] = {
    "transformers": _transformers,
    "transformers state dict": _transformers_state_dict,
}
DOORS = PEFT_DOORS | TRANSFORMERS_DOORS
SOME_DOORS = ["from_pretrained", "load_adapter", "inject low memory", "transformers"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.float16, torch.float16),
        (torch.float64, torch.float64),
    ],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
@pytest.mark.parametrize("door", PEFT_DOORS)
def test_loading_undoes_saving(door: str, dtype: torch.dtype, values: torch.dtype, stored: Stored) -> None:
    """Base models and values of every dtype; half-precision values come from `autocast_adapter_dtype=False`."""
    model, folder = stored(dtype, autocast=values != dtype)
    held = contents(model)
    assert held["vit.layers.0.mlp.fc2.fps_values"].dtype == values
    loaded = PEFT_DOORS[door](tiny_vit().to(dtype), folder, "default")
    assert_equal(contents(loaded), held)
    assert bits(logits(loaded)) == bits(logits(model))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("door", TRANSFORMERS_DOORS)
def test_loading_through_transformers(door: str, dtype: torch.dtype, stored: Stored) -> None:
    """transformers keeps every adapter in the base model's dtype, so values are rounded to it."""
    model, folder = stored(dtype)
    loaded = TRANSFORMERS_DOORS[door](tiny_vit().to(dtype), folder, "default")
    held = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in contents(model).items()
    }
    assert_equal(contents(loaded), held)
    if dtype.itemsize > 2:
        assert bits(logits(loaded)) == bits(logits(model))


@pytest.mark.parametrize("door", SOME_DOORS)
@pytest.mark.parametrize(
    "options",
    [
        *({"granularity": granularity, "per_neuron": 1.4} for granularity in ("neuron", "layer", "model")),
        {"bias": "none"},
        {"bias": "all"},
        {"modules_to_save": []},
        {"modules_to_save": ["classifier", "layernorm"]},
        {"budget": 0, "per_neuron": None},
        {"per_neuron": 1000},
        {"target_modules": None},
    ],
    ids=[
        "neuron",
        "layer",
        "model",
        "no bias",
        "no norm",
        "no head",
        "head and norm",
        "biases alone",
        "every entry",
        "all layers",
    ],
)
def test_every_shape_of_an_adapter(door: str, options: dict[str, Any], stored: Stored) -> None:
    """Rows may be empty, and the split over modules may be anything."""
    model, folder = stored(**options)
    if "granularity" in options:
        counts = [layer.fps_row_counts["default"] for layer in weighted_of(model).values()]
        assert (options["granularity"] == "neuron") == all(int(count.min()) >= 1 for count in counts)
    loaded = DOORS[door](tiny_vit(), folder, "default")
    assert_equal(contents(loaded), contents(model))
    assert bits(logits(loaded)) == bits(logits(model))


@pytest.mark.parametrize("door", DOORS)
def test_under_another_name_and_with_the_base_weights_left_alone(door: str, stored: Stored) -> None:
    model, folder = stored()
    loaded = DOORS[door](tiny_vit(), folder, "my adapter")
    assert_equal(contents(loaded, "my adapter"), contents(model))
    assert bits(logits(loaded)) == bits(logits(model))

    held = {name.replace("base_layer.", "").replace("original_module.", ""): value
            for name, value in loaded.state_dict().items()}  # fmt: skip
    for name, weight in tiny_vit().state_dict().items():
        assert torch.equal(held.get(f"base_model.model.{name}", held.get(name)), weight), name


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("door", ["from_pretrained", "load_adapter", "transformers"])
def test_trainable_on_request(door: str, trainable: bool, stored: Stored) -> None:
    _, folder = stored()
    if door == "from_pretrained":
        model: nn.Module = PeftModel.from_pretrained(tiny_vit(), folder, is_trainable=trainable)
    elif door == "transformers":
        model = tiny_vit()
        model.load_adapter(folder, is_trainable=trainable)
    else:
        model = adapted(tiny_vit(), "first")
        model.load_adapter(folder, "default", is_trainable=trainable)
        model.set_adapter("default", inference_mode=not trainable)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad and "first" not in name}
    adapter = {name for name in model.state_dict() if name.endswith(("fps_values.default", "fps_bias.default"))}
    head = {name for name, _ in model.named_parameters() if "modules_to_save.default" in name}
    if trainable:
        assert trained == adapter | head
    else:  # transformers freezes the tuner layers alone
        assert trained == (head if door == "transformers" else set())


def test_a_language_model_through_auto_classes(tmp_path: Path) -> None:
    """`Conv1D` stores its weight the other way round; the adapter file does not."""
    tiny_gpt2().save_pretrained(tmp_path / "base")
    base = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    model = adapted(base, target_modules=["c_attn", "c_proj"], task_type="CAUSAL_LM").eval()
    loaded = AutoPeftModelForCausalLM.from_pretrained(saved(model, tmp_path / "adapter"))
    assert_equal(contents(loaded), contents(model))
    with torch.no_grad():
        assert bits(loaded(tokens()).logits) == bits(model(tokens()).logits)


class TestBaseRecordedInTheConfig:
    """Loading calls that find the base model by themselves."""

    @pytest.fixture
    def model(self, tmp_path: Path) -> PeftModel:
        tiny_vit().save_pretrained(tmp_path / "base")
        base = ViTForImageClassification.from_pretrained(tmp_path / "base")
        model = adapted(base, target_modules=TARGETS, per_neuron=2.3)
        model.save_pretrained(tmp_path / "adapter")
        assert json.loads((tmp_path / "adapter" / CONFIG).read_text())["base_model_name_or_path"] == str(
            tmp_path / "base"
        )
        return model

    @pytest.mark.parametrize(
        "load",
        [
            AutoPeftModel.from_pretrained,
            ViTForImageClassification.from_pretrained,
            AutoModelForImageClassification.from_pretrained,
        ],
        ids=["AutoPeftModel", "ViTForImageClassification", "AutoModelForImageClassification"],
    )
    def test_from_the_adapter_folder(self, load: Callable[..., nn.Module], model: PeftModel, tmp_path: Path) -> None:
        loaded = load(tmp_path / "adapter")
        assert_equal(contents(loaded), contents(model))
        assert bits(logits(loaded)) == bits(logits(model))

    def test_another_base_is_noticed(self, model: PeftModel, tmp_path: Path) -> None:
        other = tiny_vit()
        with torch.no_grad():
            other.vit.layers[1].mlp.fc2.weight += 0.1
        other.save_pretrained(tmp_path / "base")
        for load in (AutoPeftModel.from_pretrained, ViTForImageClassification.from_pretrained):
            with pytest.raises(ValueError, match="base weights: found fingerprint"):
                load(tmp_path / "adapter")


# --- several adapters -----------------------------------------------------------------------------------------------


def two_adapters(second: str = "second", **options: Any) -> PeftModel:
    model = trained_vit(**options)
    model.add_adapter(second, config(per_neuron=1.5, target_modules=["q_proj", "v_proj"], **options))
    fill(model, second, seed=5)
    return model.eval()


@pytest.mark.parametrize("by", ["path", "subfolder"])
def test_several_adapters_in_one_folder_tree(by: str, tmp_path: Path) -> None:
    model = two_adapters()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path)
    where = {"model_id": tmp_path / "second"} if by == "path" else {"model_id": tmp_path, "subfolder": "second"}
    loaded.load_adapter(adapter_name="second", **where)
    for name in ("default", "second"):
        model.set_adapter(name)
        loaded.set_adapter(name)
        assert_equal(contents(loaded, name), contents(model, name))
        assert bits(logits(loaded)) == bits(logits(model))


def test_several_adapters_at_once(tmp_path: Path) -> None:
    model = two_adapters(modules_to_save=[])  # PEFT allows one head at a time
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path)
    loaded.load_adapter(tmp_path / "second", "second")
    for each in (model, loaded):
        each.base_model.set_adapter(["default", "second"])
    assert bits(logits(loaded)) == bits(logits(model))
    plain = dense_reference(tiny_vit(), model, ["default", "second"])
    torch.testing.assert_close(logits(loaded), logits(plain), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["0", "attention", "vit", "fps_values", "weight", "classifier"])
def test_an_adapter_named_like_a_part_of_the_model(name: str, tmp_path: Path) -> None:
    """Is refused, or both adapters' files are complete (PEFT leaves out keys that contain the other's name)."""
    refusal = ""
    try:
        model = two_adapters(name)
    except ValueError as error:
        refusal = str(error)
    if refusal:
        assert repr(name) in refusal
        return
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path)
    loaded.load_adapter(tmp_path / name, name)
    for adapter in ("default", name):
        assert_equal(contents(loaded, adapter), contents(model, adapter))


def test_only_the_named_adapter_is_saved(tmp_path: Path) -> None:
    two_adapters().save_pretrained(tmp_path, selected_adapters=["second"])
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")} == {
        "README.md",
        "second/README.md",
        f"second/{CONFIG}",
        f"second/{WEIGHTS}",
    }


# --- state dicts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", ["PeftModel", "injected"])
def test_state_dict_functions(wrapped: str) -> None:
    def build(seed: int) -> nn.Module:
        options = {"target_modules": TARGETS, "per_neuron": 2.3, "granularity": "layer"}
        if wrapped == "PeftModel":
            model: nn.Module = get_peft_model(tiny_vit(), config(**options))
        else:
            model = inject_adapter_in_model(config(**options), tiny_vit())
        fill(model, seed=seed)
        return model

    model, other = build(1), build(2)
    state = get_peft_model_state_dict(model)
    result = set_peft_model_state_dict(other, state)
    assert result.unexpected_keys == []
    assert [key for key in result.missing_keys if "fps_" in key or "modules_to_save" in key] == []
    assert_equal(contents(other), contents(model))
    again = get_peft_model_state_dict(other)
    assert {key: (tensor.dtype, bits(tensor)) for key, tensor in again.items()} == {
        key: (tensor.dtype, bits(tensor)) for key, tensor in state.items()
    }


def test_the_state_dict_is_what_the_file_holds(stored: Stored) -> None:
    model, folder = stored()
    state, file = get_peft_model_state_dict(model), load_file(folder / WEIGHTS)
    assert {key: bits(tensor) for key, tensor in state.items()} == {key: bits(tensor) for key, tensor in file.items()}


def test_loading_does_not_alias_the_state_dict() -> None:
    state = get_peft_model_state_dict(trained_vit(bias="all"))
    state = {key: tensor.clone() for key, tensor in state.items()}
    model = get_peft_model(tiny_vit(), config(granularity="layer", per_neuron=2.3, target_modules=TARGETS))
    set_peft_model_state_dict(model, state)
    before = bits(logits(model.eval()))
    for tensor in state.values():
        tensor.zero_()
    assert bits(logits(model)) == before


def test_another_selection_replaces_the_one_in_place() -> None:
    """Structure that was derived from the old columns must not be used with the new ones."""
    model = get_peft_model(tiny_vit(), config(importance="random", seed=1, target_modules=TARGETS))
    other = get_peft_model(tiny_vit(), config(importance="random", seed=2, target_modules=TARGETS))
    fill(other)
    logits(model.eval())
    set_peft_model_state_dict(model, get_peft_model_state_dict(other))
    assert bits(logits(model)) == bits(logits(other.eval()))


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", ["all", "with_norms"])
def test_names_dtypes_and_shapes_are_those_of_the_table(bias: str, tmp_path: Path) -> None:
    """A norm is in the file as a module without inputs."""
    model = adapted(tiny_vit(), target_modules=["q_proj", "projection"], per_neuron=3, bias=bias)
    found = load_file(saved(model, tmp_path) / WEIGHTS)
    expected = {"base_model.model.classifier.weight": (torch.float32, (5, 32))}
    expected["base_model.model.classifier.bias"] = (torch.float32, (5,))
    patches = "vit.embeddings.patch_embeddings.projection"
    norms = [f"vit.layers.{i}.layernorm_{place}" for i in range(2) for place in ("before", "after")] + [
        "vit.layernorm"
    ]
    entries = {"vit.layers.0.attention.q_proj": 96, "vit.layers.1.attention.q_proj": 96, patches: 96}
    entries |= dict.fromkeys(norms if bias == "with_norms" else [], 0)
    for path, count in entries.items():
        for name, dtype, size in (
            ("fps_values", torch.float32, count),
            ("fps_columns", torch.uint16, count),
            ("fps_row_counts", torch.uint8, 32),
            ("fps_bias", torch.float32, 32),
        ):
            expected[f"base_model.model.{path}.{name}"] = (dtype, (size,))
    assert {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in found.items()} == expected
    allocation = json.loads((tmp_path / CONFIG).read_text())["record"]["allocation"]
    inputs = {path: 0 if path in norms else 48 if path == patches else 32 for path in entries}
    assert allocation == {
        path: {"neurons": 32, "inputs": inputs[path], "entries": count} for path, count in entries.items()
    }


def test_a_fan_in_above_65536_and_more_than_255_entries(tmp_path: Path) -> None:
    model = adapted(tiny_mlp(65_537, 2, 3), target_modules=["first"], per_neuron=300, importance="random")
    layer = model.base_model.model.first
    columns, row_counts = layer.fps_columns["default"].clone(), layer.fps_row_counts["default"]
    columns[-1] = 65_536  # the last column there is
    layer.set_selection("default", columns, row_counts)
    found = load_file(saved(model, tmp_path) / WEIGHTS)
    assert found["base_model.model.first.fps_columns"].dtype == torch.int32
    assert found["base_model.model.first.fps_row_counts"].dtype == torch.uint16
    loaded = PeftModel.from_pretrained(tiny_mlp(65_537, 2, 3), tmp_path)
    assert_equal(contents(loaded), contents(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_large_columns_survive_a_half_precision_base(dtype: torch.dtype, tmp_path: Path) -> None:
    """2761 is no bfloat16 number, and 70,000 is no float16 one."""
    model = adapted(tiny_mlp(70_001, 2, 3).to(dtype), target_modules=["first"], per_neuron=2)
    layer = model.base_model.model.first
    layer.set_selection("default", torch.tensor([853, 2761, 69_999, 70_000]), layer.fps_row_counts["default"])
    for low_memory in (False, True):
        loaded = PeftModel.from_pretrained(
            tiny_mlp(70_001, 2, 3).to(dtype), saved(model, tmp_path), low_cpu_mem_usage=low_memory
        )
        assert loaded.base_model.model.first.fps_columns["default"].tolist() == [853, 2761, 69_999, 70_000]


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    model = trained_vit(exclude_modules=["k_proj", "fc1"])
    first, second = saved(model, tmp_path / "first"), saved(model, tmp_path / "second")
    again = saved(PeftModel.from_pretrained(tiny_vit(), first), tmp_path / "again")
    for name in (WEIGHTS, CONFIG):
        assert (first / name).read_bytes() == (second / name).read_bytes() == (again / name).read_bytes()


def test_saving_over_another_adapter_replaces_it_and_its_folder_can_be_moved(tmp_path: Path) -> None:
    saved(trained_vit(seed=1), tmp_path / "here")
    model = trained_vit(seed=2, per_neuron=1)
    shutil.move(saved(model, tmp_path / "here"), tmp_path / "there")
    loaded = PeftModel.from_pretrained(tiny_vit(), os.fspath(tmp_path / "there"))
    assert_equal(contents(loaded), contents(model))


def test_an_invalid_adapter_is_not_written(tmp_path: Path) -> None:
    model = trained_vit()
    folder = saved(model, tmp_path)
    before = {name: (folder / name).read_bytes() for name in (WEIGHTS, CONFIG)}
    model.base_model.model.vit.layers[1].mlp.fc2.fps_values["default"].data[3] = float("nan")
    with pytest.raises(ValueError, match=r"vit.layers.1.mlp.fc2: .*fps_values contains NaN"):
        model.save_pretrained(folder)
    assert {name: (folder / name).read_bytes() for name in (WEIGHTS, CONFIG)} == before


def test_a_merged_adapter_is_saved_as_it_is(tmp_path: Path) -> None:
    model = trained_vit()
    first = saved(model, tmp_path / "first")
    model.merge_adapter()
    merged = saved(model, tmp_path / "merged")
    for name in (WEIGHTS, CONFIG):
        assert (first / name).read_bytes() == (merged / name).read_bytes()


class TestGolden:
    """A file of format version 1, byte by byte; files that exist must stay readable for good."""

    # y0 = ... + 0.5 x1 - 1.5 x3,  y1 = ...,  y2 = ... + 2 x0;  biases + 0.25, 0, -1
    TENSORS = {
        "fps_values": ("F32", struct.pack("<3f", 0.5, -1.5, 2.0)),
        "fps_columns": ("U16", struct.pack("<3H", 1, 3, 0)),
        "fps_row_counts": ("U8", bytes([2, 0, 1])),
        "fps_bias": ("F32", struct.pack("<3f", 0.25, 0.0, -1.0)),
    }
    ALLOCATION = {"first": {"neurons": 3, "inputs": 4, "entries": 3}}

    def golden_bytes(self) -> bytes:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        data = b""
        # safetensors: larger types first, then by name
        for name in ("fps_bias", "fps_values", "fps_columns", "fps_row_counts"):
            dtype, content = self.TENSORS[name]
            size = len(content) // {"F32": 4, "U16": 2, "U8": 1}[dtype]
            offsets = [len(data), len(data) + len(content)]
            header[f"base_model.model.first.{name}"] = {"dtype": dtype, "shape": [size], "data_offsets": offsets}
            data += content
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text + data

    def write(self, folder: Path, **fields: Any) -> Path:
        folder.mkdir()
        (folder / WEIGHTS).write_bytes(self.golden_bytes())
        minimal = {"peft_type": "FPS", "target_modules": ["first"], "per_neuron": 1}
        (folder / CONFIG).write_text(json.dumps({**minimal, "record": {"allocation": self.ALLOCATION}, **fields}))
        return folder

    def test_loads_and_is_written(self, tmp_path: Path) -> None:
        base = tiny_mlp(4, 3, 2)
        loaded = PeftModel.from_pretrained(tiny_mlp(4, 3, 2), self.write(tmp_path / "golden"))
        with torch.no_grad():
            base.first.weight += torch.tensor([[0, 0.5, 0, -1.5], [0, 0, 0, 0], [2.0, 0, 0, 0]])
            base.first.bias += torch.tensor([0.25, 0, -1])
            x = normal(7, 4)
            torch.testing.assert_close(loaded(x), base(x), atol=1e-6, rtol=0)
        assert (saved(loaded, tmp_path / "again") / WEIGHTS).read_bytes() == self.golden_bytes()

    def test_files_by_hand_are_accepted_in_every_allowed_dtype(self, tmp_path: Path) -> None:
        folder = self.write(tmp_path / "golden")
        held = contents(PeftModel.from_pretrained(tiny_mlp(4, 3, 2), folder))
        for columns in (torch.uint16, torch.int32):
            for counts in (torch.uint8, torch.uint16, torch.uint32, torch.int32):
                tensors = {
                    "fps_values": torch.tensor([0.5, -1.5, 2.0]),
                    "fps_columns": torch.tensor([1, 3, 0]).to(columns),
                    "fps_row_counts": torch.tensor([2, 0, 1]).to(counts),
                    "fps_bias": torch.tensor([0.25, 0.0, -1.0]),
                }
                named = {f"base_model.model.first.{name}": tensor for name, tensor in tensors.items()}
                save_file(named, folder / WEIGHTS, metadata={"format": "pt"})
                assert_equal(contents(PeftModel.from_pretrained(tiny_mlp(4, 3, 2), folder)), held)

    def test_the_written_config_is_complete(self, tmp_path: Path) -> None:
        model = get_peft_model(
            TinyMLP(4, 3, 2), FPSConfig(per_neuron=1, target_modules=["first"], importance="magnitude")
        )
        written = json.loads((saved(model, tmp_path) / CONFIG).read_text())
        assert written["format_version"] == 2
        assert written["plugin"] == "peft_fps"
        assert written["record"]["allocation"] == self.ALLOCATION
        assert set(written["record"]["base_fingerprint"]) == {"sha256", "dtype", "sample"}
        assert "check_base" not in written


# --- another base ---------------------------------------------------------------------------------------------------


def other_vit() -> ViTForImageClassification:
    model = tiny_vit()
    with torch.no_grad():
        model.vit.layers[0].attention.q_proj.weight.neg_()
    return model


def test_another_base_is_refused_by_default_and_warns_on_request(stored: Stored, tmp_path: Path) -> None:
    """The loading side's choice is not saved."""
    model, folder = stored()
    with pytest.raises(ValueError, match=r"base weights: found fingerprint .*, expected .*check_base='warn'"):
        PeftModel.from_pretrained(other_vit(), folder)
    with pytest.warns(UserWarning, match=r"base weights: found fingerprint .*, expected"):
        loaded = PeftModel.from_pretrained(other_vit(), folder, check_base="warn")
    assert_equal(contents(loaded), contents(model))
    assert "check_base" not in json.loads((saved(loaded, tmp_path / "again") / CONFIG).read_text())


def test_another_base_warns_on_request_for_a_second_adapter(stored: Stored) -> None:
    """`load_adapter` has no room for config fields, so the choice is made in the config."""
    first, folder = stored()
    model = adapted(other_vit(), "first")
    with pytest.raises(ValueError, match="base weights"):
        model.load_adapter(folder, "second")
    with pytest.warns(UserWarning, match="base weights"):
        model.add_adapter("second", FPSConfig.from_pretrained(folder, check_base="warn"))
    model.load_adapter(folder, "second")
    assert_equal(contents(model, "second"), contents(first))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_same_base_in_another_precision_is_accepted(dtype: torch.dtype, stored: Stored) -> None:
    model, folder = stored()
    loaded = PeftModel.from_pretrained(tiny_vit().to(dtype), folder)
    for name in ("fps_values", "fps_columns"):
        path = f"vit.layers.0.mlp.fc2.{name}"
        assert torch.equal(contents(loaded)[path].float(), contents(model)[path].float())


def test_an_adapter_beside_a_merged_one_meets_the_same_base(stored: Stored) -> None:
    expected, folder = stored(seed=2)
    model = trained_vit()
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):  # PEFT's doing
        model.load_adapter(folder, "second")
    model.set_adapter("second")
    assert bits(logits(model)) == bits(logits(expected))


# --- use after loading ----------------------------------------------------------------------------------------------


def test_a_loaded_adapter_can_be_merged_trained_and_saved_again(stored: Stored, tmp_path: Path) -> None:
    _, folder = stored()
    model = PeftModel.from_pretrained(tiny_vit(), folder, is_trainable=True)
    model.train()
    model(pixel_values=images(), labels=torch.tensor([0, 1, 2, 3])).loss.backward()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None for parameter in trainable)
    torch.optim.SGD(trainable, 0.1).step()
    again = PeftModel.from_pretrained(tiny_vit(), saved(model, tmp_path / "second"))
    assert_equal(contents(again), contents(model))
    expected = logits(again)
    torch.testing.assert_close(logits(again.merge_and_unload()), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("door", SOME_DOORS)
def test_a_loaded_adapter_computes_w_plus_delta(door: str, stored: Stored) -> None:
    model, folder = stored(modules_to_save=[])
    loaded = DOORS[door](tiny_vit(), folder, "default")
    plain = dense_reference(tiny_vit(), model, ["default"])
    torch.testing.assert_close(logits(loaded), logits(plain), atol=1e-5, rtol=1e-5)
    layer = layers_of(loaded)["vit.layers.1.mlp.fc2"]
    assert int((dense_change(layer) != 0).sum()) == layer.fps_values["default"].numel()


def test_a_loaded_selection_counts_as_chosen(tmp_path: Path) -> None:
    """Training it further warns about nothing (warnings are errors here)."""
    model = get_peft_model(tiny_vit(), FPSConfig(per_neuron=2, target_modules=TARGETS))
    model.calibrate([{"pixel_values": images()}], progress=False)
    loaded = PeftModel.from_pretrained(tiny_vit(), saved(model, tmp_path), is_trainable=True)
    loaded.train()
    loaded(pixel_values=images(), labels=torch.tensor([0, 1, 2, 3])).loss.backward()
    calibrations = [next(iter(layers_of(each).values())).fps_state["default"].calibration for each in (model, loaded)]
    assert calibrations[0] is not None
    assert calibrations[0] == calibrations[1] == loaded.peft_config["default"].record.calibration
    assert str(loaded.selection_report()) == str(model.selection_report())


# --- a fresh process ------------------------------------------------------------------------------------------------

_LOAD = """
import sys, torch, hashlib
from transformers import ViTForImageClassification, logging
from peft import PeftModel
logging.disable_progress_bar()
logging.set_verbosity_error()
base, x, adapter, again = sys.argv[1:]
base = ViTForImageClassification.from_pretrained(base)
try:
    PeftModel.from_pretrained(base, adapter)
except Exception as error:
    print(type(error).__name__, error)
import peft_fps
model = PeftModel.from_pretrained(base, adapter)
with torch.no_grad():
    print(hashlib.sha256(model(torch.load(x)).logits.numpy().tobytes()).hexdigest())
model.save_pretrained(again)
"""


def test_a_fresh_process_needs_the_import_and_nothing_else(tmp_path: Path) -> None:
    tiny_vit().save_pretrained(tmp_path / "base")
    torch.save(images(), tmp_path / "x.pt")
    model = trained_vit(exclude_modules=["k_proj", "fc1"])
    folder = saved(model, tmp_path / "adapter")
    paths = [str(tmp_path / "base"), str(tmp_path / "x.pt"), str(folder), str(tmp_path / "again")]
    process = start_python(_LOAD, *paths, PYTHONHASHSEED="7", PYTHONWARNINGS="ignore")
    expected = hashlib.sha256(logits(model).numpy().tobytes()).hexdigest()
    assert finish(process).splitlines() == ["KeyError 'FPS'", expected]
    for name in (WEIGHTS, CONFIG):
        text = (folder / name).read_bytes()
        again = (tmp_path / "again" / name).read_bytes()
        if name == CONFIG:  # the other process knows where its base came from
            again = again.replace(json.dumps(str(tmp_path / "base")).encode(), b"null")
        assert again == text


def test_loading_into_a_merged_adapter_is_refused(tmp_path: Path) -> None:
    """The model would go on with what was merged, and save what was loaded."""
    first = adapted(tiny_mlp(), modules_to_save=[]).eval()
    first.save_pretrained(tmp_path / "first")
    fill(first, seed=5)
    first.save_pretrained(tmp_path / "second")
    model = PeftModel.from_pretrained(tiny_mlp(), tmp_path / "first").eval()
    model.merge_adapter()
    expected = model(normal(3, 10))
    tensors = {name: bits(tensor) for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"first: adapter 'default' is merged into .*unmerge_adapter\(\) first"):
        model.load_adapter(tmp_path / "second", "default")
    assert {name: bits(tensor) for name, tensor in model.state_dict().items()} == tensors
    assert torch.equal(model(normal(3, 10)), expected)
    model.unmerge_adapter()
    model.load_adapter(tmp_path / "second", "default")
    torch.testing.assert_close(model(normal(3, 10)), first(normal(3, 10)))


def test_a_state_dict_without_what_is_merged_is_named_once_and_can_be_unmerged() -> None:
    model = adapted(tiny_mlp(), modules_to_save=[]).eval()
    unmerged = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = model(normal(3, 10))
    model.merge_adapter()
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()})
    with pytest.warns(UserWarning, match=r"^first: .*'default' is merged, and load_state_dict has brought") as caught:
        model.load_state_dict(unmerged)
    assert len(caught) == 1
    model.unmerge_adapter()
    assert {name: bits(tensor) for name, tensor in model.state_dict().items()} == {
        name: bits(tensor) for name, tensor in unmerged.items()
    }
    assert torch.equal(model(normal(3, 10)), expected)
