"""An adapter's life on a model: made, added, switched, disabled, deleted, merged, copied, moved; what is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import ModelHook, SequentialHook, add_hook_to_module
from peft import (
    LoraConfig,
    PeftModel,
    get_layer_status,
    get_model_status,
    get_peft_model,
    inject_adapter_in_model,
    prepare_model_for_kbit_training,
)
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_fps import FPSConfig, FPSModel
from peft_fps.checkpoint import fingerprint
from tests.support.helpers import (
    TinyConv,
    adapted,
    base_bytes,
    bits,
    config,
    dense_reference,
    fill,
    image_batches,
    images,
    layers_of,
    normal,
    selected_columns,
    through_transformers,
    tiny_bert,
    tiny_conv,
    tiny_gpt2,
    tiny_llama,
    tiny_mlp,
    tiny_vit,
    unchanged,
)


pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")

QUERY = "vit.layers.0.attention.q_proj"
LABELS = torch.tensor([0, 1, 2, 3])


def logits(model: nn.Module, x: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(pixel_values=images() if x is None else x).logits


def loss(model: nn.Module) -> Tensor:
    return model(pixel_values=images(), labels=LABELS).loss


def selections(model: nn.Module, adapter: str = "default") -> dict[str, list[list[int]]]:
    return {path: selected_columns(layer, adapter) for path, layer in layers_of(model).items()
            if adapter in layer.fps_values}  # fmt: skip


def perturb_head(model: nn.Module, adapter: str, seed: int) -> None:
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            for parameter in module.modules_to_save[adapter].parameters():
                parameter.data += normal(*parameter.shape, seed=seed)


def two_adapters() -> PeftModel:
    model = adapted(tiny_vit(), "first")
    model.add_adapter("second", config(target_modules=["q_proj", "fc2"], importance="random"))
    fill(model, "second", seed=2)
    perturb_head(model, "first", 3)
    perturb_head(model, "second", 4)
    return model.eval()


def reference(model: PeftModel, adapter: str) -> Tensor:
    """Result of a plain model with the adapter's change and head written into it."""
    plain = dense_reference(tiny_vit(), model, [adapter])
    plain.classifier = copy.deepcopy(model.base_model.model.classifier.modules_to_save[adapter])
    return logits(plain)


# --- made -----------------------------------------------------------------------------------------------------------


def test_a_new_adapter_changes_nothing() -> None:
    model = adapted(tiny_vit(), filled=False)
    assert isinstance(model.base_model, FPSModel)
    assert bits(logits(model)) == bits(logits(tiny_vit()))


def test_low_cpu_mem_usage_makes_values_on_meta_which_cannot_be_used_and_touches_no_weight() -> None:
    model = get_peft_model(tiny_vit(), config(), low_cpu_mem_usage=True).eval()
    layer = layers_of(model)[QUERY]
    assert {p.device.type for p in (layer.fps_values["default"], layer.fps_bias["default"])} == {"meta"}
    assert layer.base_layer.weight.device.type == "cpu"
    with pytest.raises(ValueError, match=r"vit\..*meta"):
        logits(model)
    model.disable_adapter_layers()
    assert bits(logits(model)) == bits(logits(tiny_vit()))


class TestHead:
    """A `...For...Classification` model starts with a random output head, which is trained along."""

    @pytest.mark.parametrize(
        ("build", "head"), [(tiny_vit, ["classifier"]), (tiny_bert, ["classifier"])], ids=["vit", "bert"]
    )
    def test_of_a_classification_model_is_trained_whole(self, build: Any, head: list[str]) -> None:
        model = adapted(build())
        assert list(model.peft_config["default"].modules_to_save) == head
        assert isinstance(model.base_model.model.classifier, ModulesToSaveWrapper)
        assert all("classifier" not in path for path in layers_of(model))
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert {name for name in trained if "fps_" not in name} == {
            "base_model.model.classifier.modules_to_save.default.weight",
            "base_model.model.classifier.modules_to_save.default.bias",
        }

    @pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama, tiny_mlp, tiny_conv], ids=lambda build: build.__name__)
    def test_of_other_models_is_left_alone(self, build: Any) -> None:
        model = adapted(build())
        assert not model.peft_config["default"].modules_to_save
        assert not [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]

    def test_none_or_more_on_request(self) -> None:
        model = adapted(tiny_vit(), modules_to_save=[])
        assert not [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
        assert not [n for n, p in model.named_parameters() if p.requires_grad and "fps_" not in n]
        model = adapted(tiny_vit(), modules_to_save=["classifier", "layernorm"])
        wrapped = {name for name, module in model.base_model.model.named_modules()
                   if isinstance(module, ModulesToSaveWrapper)}  # fmt: skip
        assert wrapped == {"classifier", "vit.layernorm"}


# --- several --------------------------------------------------------------------------------------------------------


def test_adapters_are_switched_with_their_heads() -> None:
    model = two_adapters()
    for name in ("second", "first", "second"):
        model.set_adapter(name)
        assert model.active_adapters == [name]
        torch.testing.assert_close(logits(model), reference(model, name), atol=1e-5, rtol=1e-5)


def test_only_the_active_adapter_is_trainable() -> None:
    model = two_adapters()
    model.set_adapter("second")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(".second" in name for name in trained)
    assert {path for path in layers_of(model) if f"base_model.model.{path}.fps_values.second" in trained} == set(
        selections(model, "second")
    )


def test_several_active_adapters_add_up() -> None:
    model = adapted(tiny_vit(), "first", modules_to_save=[])
    model.add_adapter("second", config(target_modules=["q_proj", "fc2"], modules_to_save=[], importance="random"))
    fill(model, "second", seed=2)
    model.base_model.set_adapter(["first", "second"])
    plain = dense_reference(tiny_vit(), model, ["first", "second"])
    torch.testing.assert_close(logits(model), logits(plain), atol=1e-5, rtol=1e-5)


def test_disabling_gives_the_base_model_and_enabling_the_adapter() -> None:
    model = two_adapters()
    before = bits(logits(model))
    with model.disable_adapter():
        assert bits(logits(model)) == bits(logits(tiny_vit()))
    assert bits(logits(model)) == before
    model.disable_adapter_layers()
    assert bits(logits(model)) == bits(logits(tiny_vit()))
    model.enable_adapter_layers()
    assert bits(logits(model)) == before


def test_deleting_leaves_nothing_behind_and_the_name_can_be_used_again() -> None:
    model = two_adapters()
    model.set_adapter("first")
    model.delete_adapter("second")
    assert list(model.peft_config) == ["first"]
    assert not [name for name in model.state_dict() if "second" in name]
    for layer in layers_of(model).values():
        for held in (layer.fps_values, layer.fps_bias, layer.fps_columns, layer.fps_row_counts, layer.fps_state):
            assert "second" not in held
    torch.testing.assert_close(logits(model), reference(model, "first"), atol=1e-5, rtol=1e-5)
    model.add_adapter("second", config(target_modules=["fc1"]))
    assert set(selections(model, "second")) == {"vit.layers.0.mlp.fc1", "vit.layers.1.mlp.fc1"}


@pytest.mark.parametrize("second", ["PeftModel", "injected", pytest.param("transformers", marks=through_transformers)])
def test_a_refused_second_adapter_leaves_the_first(second: str) -> None:
    wrong = config(budget=0.00001, target_modules=["q_proj"])
    if second == "PeftModel":
        model: nn.Module = adapted(tiny_vit(), "first")
    else:
        model = inject_adapter_in_model(config(), tiny_vit(), "first")
        fill(model, "first")
        model._hf_peft_config_loaded = True  # what transformers' add_adapter does besides
    before = bits(logits(model))
    add: dict[str, Callable[[], object]] = {
        "PeftModel": lambda: model.add_adapter("second", wrong),
        "injected": lambda: inject_adapter_in_model(wrong, model, "second"),
        "transformers": lambda: model.add_adapter(wrong, "second"),
    }
    with unchanged(model), pytest.raises(ValueError, match="biases of the"):
        add[second]()
    assert list(model.peft_config) == ["first"]
    assert bits(logits(model)) == before


# --- one config for many --------------------------------------------------------------------------------------------


class TestOneConfigForMany:
    """One `FPSConfig` object may be used as often as one likes."""

    def test_two_adapters_are_independent(self) -> None:
        ours = FPSConfig(per_neuron=2, target_modules=["q_proj", "fc2"])
        model = get_peft_model(tiny_vit(), ours, "first")
        model.add_adapter("second", ours)
        before = selections(model, "second")
        model.calibrate(image_batches(), adapter_name="first", progress=False)
        fill(model, "first")
        assert selections(model, "second") == before
        assert selections(model, "first") != before
        for layer in layers_of(model).values():
            assert not bool(layer.fps_values["second"].any())
        assert "3 examples" not in str(model.selection_report("second"))
        assert "until calibrated" in str(model.selection_report("second"))
        assert "12 examples" in str(model.selection_report("first"))

    def test_two_adapters_are_saved_with_what_is_their_own(self, tmp_path: Path) -> None:
        ours = FPSConfig(per_neuron=2, target_modules=["q_proj"], granularity="model")
        model = get_peft_model(tiny_vit(), ours, "first")
        model.add_adapter("second", ours)
        model.calibrate(image_batches(), adapter_name="first", progress=False)
        model.save_pretrained(tmp_path)
        for name in ("first", "second"):
            written = json.loads((tmp_path / name / "adapter_config.json").read_text())
            held = {path: sum(map(len, rows)) for path, rows in selections(model, name).items()}
            assert {path: sizes["entries"] for path, sizes in written["record"]["allocation"].items()} == held
            assert (written["record"]["calibration"] is None) == (name == "second")

    def test_two_models_of_different_kinds(self) -> None:
        ours = config()
        models = {build: get_peft_model(build(), ours) for build in (tiny_vit, tiny_gpt2, tiny_conv)}
        for build, model in models.items():
            alone = get_peft_model(build(), config())
            assert selections(model) == selections(alone)
            assert {n for n, p in model.named_parameters() if p.requires_grad} == {
                n for n, p in alone.named_parameters() if p.requires_grad
            }

    def test_what_the_user_chose_stays(self) -> None:
        ours = config(target_modules=["q_proj"], exclude_modules=["fc1"], budget_pattern={"q_proj": 3.0})
        chosen = {f.name: copy.deepcopy(getattr(ours, f.name)) for f in fields(FPSConfig)}
        model = get_peft_model(tiny_vit(), ours)
        model.calibrate(progress=False)
        model.add_adapter("second", ours)
        filled_in = {"modules_to_save"}
        by_peft = {
            "base_model_name_or_path",
            "auto_mapping",
            "inference_mode",
            "peft_version",
            "task_type",
            "revision",
        }
        for name in chosen.keys() - filled_in - by_peft:
            assert getattr(ours, name) == chosen[name], name

    def test_saving_changes_no_field_and_binds_no_other_model(self, tmp_path: Path) -> None:
        ours = config()
        model = get_peft_model(tiny_vit(), ours)
        before = {f.name: copy.deepcopy(getattr(ours, f.name)) for f in fields(FPSConfig)}
        model.save_pretrained(tmp_path)
        assert {f.name: getattr(ours, f.name) for f in fields(FPSConfig)} == before
        assert ours.record is None
        assert FPSConfig.from_pretrained(str(tmp_path)).record is not None
        second = get_peft_model(tiny_gpt2(), ours)
        assert selections(second) == selections(get_peft_model(tiny_gpt2(), config()))
        ours.save_pretrained(str(tmp_path / "config"))  # of no adapter
        assert FPSConfig.from_pretrained(str(tmp_path / "config")).record is None

    def test_a_copy_with_another_choice_has_that_choice(self) -> None:
        """What a model has written into the object must not bind its copies."""
        ours = config(per_neuron=2)
        get_peft_model(tiny_vit(), ours)
        model = get_peft_model(tiny_vit(), replace(ours, per_neuron=3)).eval()
        assert selections(model) == selections(adapted(tiny_vit(), per_neuron=3))
        assert bits(logits(model)) == bits(logits(tiny_vit()))

    def test_a_saved_adapter_s_config_can_start_a_new_one(self, tmp_path: Path) -> None:
        adapted(tiny_vit(), target_modules=["q_proj"]).save_pretrained(tmp_path)
        loaded = FPSConfig.from_pretrained(tmp_path)
        model = PeftModel.from_pretrained(tiny_vit(), tmp_path)
        other = PeftModel.from_pretrained(tiny_vit(), tmp_path, config=loaded)
        assert selections(model) == selections(other)


# --- status ---------------------------------------------------------------------------------------------------------


def test_status() -> None:
    model = two_adapters()
    status = get_model_status(model)
    assert status.peft_types == {"first": "FPS", "second": "FPS"}
    assert status.adapter_model_type == "FPSModel"
    assert status.active_adapters == ["first"]
    assert sorted(status.available_adapters) == ["first", "second"]
    assert status.enabled is True
    assert status.merged_adapters == []
    layers = {layer.name.removeprefix("model."): layer for layer in get_layer_status(model)}
    assert set(layers) == {*layers_of(model), "classifier"}
    assert layers[QUERY].available_adapters == ["first", "second"]
    assert layers["vit.layers.0.mlp.fc1"].available_adapters == ["first"]
    assert layers[QUERY].devices == {"first": ["cpu"], "second": ["cpu"]}


def test_print_trainable_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    model = adapted(tiny_vit(), per_neuron=2)
    # 2 entries per neuron, and a bias delta but for k: patches 32; per block q, k, v, o 32 each, fc1 64, fc2 32
    neurons = 32 + 2 * (4 * 32 + 64 + 32)
    model.print_trainable_parameters()
    assert f"trainable params: {3 * neurons - 2 * 32 + 5 * 33:,} " in capsys.readouterr().out


# --- merging and unloading ------------------------------------------------------------------------------------------


def test_merge_and_unload_gives_a_plain_model_with_the_trained_head() -> None:
    model = two_adapters()
    model.set_adapter("second")
    expected = logits(model)
    plain = model.merge_and_unload()
    assert {name: type(module) for name, module in plain.named_modules()} == {
        name: type(module) for name, module in tiny_vit().named_modules()
    }
    torch.testing.assert_close(logits(plain), expected, atol=1e-5, rtol=1e-5)
    assert not hasattr(plain, "peft_config")


def test_unload_gives_the_base_model_with_the_base_head() -> None:
    model = two_adapters()
    plain = model.unload()
    assert {name: bits(value) for name, value in plain.state_dict().items() if "classifier" not in name} == {
        name: bits(value) for name, value in tiny_vit().state_dict().items() if "classifier" not in name
    }
    assert {name: type(module) for name, module in plain.named_modules()} == {
        name: type(module) for name, module in tiny_vit().named_modules()
    }


def test_a_merged_model_says_so_is_unloaded_with_the_base_weights_and_takes_a_new_adapter() -> None:
    model = adapted(tiny_vit(), modules_to_save=[])
    model.merge_adapter()
    assert get_model_status(model).merged_adapters == ["default"]
    model.unmerge_adapter()
    assert get_model_status(model).merged_adapters == []
    model.merge_adapter()
    plain = model.unload()
    assert bits(logits(plain)) == bits(logits(tiny_vit()))
    assert selections(adapted(plain)) == selections(adapted(tiny_vit()))


# --- copies, dtypes, devices ----------------------------------------------------------------------------------------


def test_a_deep_copy_is_a_model_of_its_own() -> None:
    model = two_adapters()
    before = bits(logits(model))
    other = copy.deepcopy(model)
    assert bits(logits(other)) == before
    held = {parameter.data_ptr() for parameter in model.parameters()}
    assert not held & {parameter.data_ptr() for parameter in other.parameters()}
    fill(other, "first", seed=9)
    other.calibrate(adapter_name="second", discard_values=True, progress=False)
    assert bits(logits(model)) == before
    assert bits(logits(other)) != before
    other.set_adapter("second")
    model.set_adapter("second")
    assert not bool(layers_of(other)[QUERY].fps_values["second"].any())
    assert bool(layers_of(model)[QUERY].fps_values["second"].all())


def test_a_pickled_model_is_the_model(tmp_path: Path) -> None:
    """As `torch.save(model)` and process pools do it."""
    model = two_adapters()
    torch.save(model, tmp_path / "model.pt")
    other = torch.load(tmp_path / "model.pt", weights_only=False)
    for name in ("first", "second"):
        model.set_adapter(name)
        other.set_adapter(name)
        assert bits(logits(other)) == bits(logits(model))


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_casting_the_model_keeps_the_indices(cast: str) -> None:
    model = adapted(tiny_mlp(3000, 5, 4), target_modules=["first"], per_neuron=2)
    layer = model.base_model.model.first
    columns = torch.tensor([853, 2761] * 5)  # 2761 is no bfloat16 number
    layer.set_selection("default", columns, layer.fps_row_counts["default"])
    model = getattr(model, cast)()
    assert layer.fps_columns["default"].dtype == layer.fps_row_counts["default"].dtype == torch.int32
    assert layer.fps_columns["default"].tolist() == [853, 2761] * 5
    dtype = layer.base_layer.weight.dtype
    assert model(normal(2, 3000).to(dtype)).dtype == dtype


def test_prepare_for_kbit_training_is_harmless() -> None:
    model = get_peft_model(prepare_model_for_kbit_training(tiny_vit(), use_gradient_checkpointing=False), config())
    assert selections(model) == selections(adapted(tiny_vit()))
    loss(model).backward()
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trainable


class TestOffload:
    """accelerate keeps weights elsewhere and brings them for each forward of a module."""

    @pytest.fixture(params=["cpu_offload", "disk_offload", "dispatch_model"])
    def offloaded(self, request: pytest.FixtureRequest, tmp_path: Path) -> nn.Module:
        model = tiny_vit()
        if request.param == "cpu_offload":
            cpu_offload(model, execution_device=torch.device("cpu"))
        elif request.param == "disk_offload":
            disk_offload(model, tmp_path / "offloaded", execution_device=torch.device("cpu"))
        else:
            device_map = {name: "cpu" for name, _ in model.named_children()}
            dispatch_model(model, device_map, main_device="cpu", force_hooks=True)
        return model

    def test_forward_training_and_calibration_work(self, offloaded: nn.Module) -> None:
        model = get_peft_model(offloaded, FPSConfig(per_neuron=2, modules_to_save=[]))
        model.calibrate(image_batches(), progress=False)
        there = get_peft_model(tiny_vit(), FPSConfig(per_neuron=2, modules_to_save=[]))
        there.calibrate(image_batches(), progress=False)
        assert selections(model) == selections(there)
        for each in (model, there):
            optimizer = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], 0.5)
            loss(each.train()).backward()
            optimizer.step()
            each.eval()
        assert bool(layers_of(model)[QUERY].fps_values["default"].any())
        torch.testing.assert_close(logits(model), logits(there), atol=1e-5, rtol=1e-4)

    def test_saving_and_loading_work(self, offloaded: nn.Module, tmp_path: Path) -> None:
        model = adapted(offloaded, modules_to_save=[])
        model.save_pretrained(tmp_path)
        expected = logits(adapted(tiny_vit(), modules_to_save=[]))
        torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)
        loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path)
        torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=1e-4)

    def test_loading_onto_an_offloaded_base(self, offloaded: nn.Module, tmp_path: Path) -> None:
        model = adapted(tiny_vit(), modules_to_save=[])
        model.save_pretrained(tmp_path / "adapter")
        loaded = PeftModel.from_pretrained(offloaded, tmp_path / "adapter")
        torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=1e-4)

    def test_merging_works(self, offloaded: nn.Module) -> None:
        model = adapted(offloaded, modules_to_save=[])
        expected = logits(adapted(tiny_vit(), modules_to_save=[]))
        model.merge_adapter()
        assert all(layer.merged for layer in layers_of(model).values())
        torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("offloaded", ["cpu_offload", "disk_offload"], indirect=True)
    def test_a_head_that_is_offloaded_is_refused(self, offloaded: nn.Module) -> None:
        """Else it would be without effect and without a word."""
        with pytest.raises(ValueError, match=r"^classifier is to be trained whole .* accelerate offloads it"):
            get_peft_model(offloaded, config())

    @pytest.mark.parametrize("offloaded", ["dispatch_model"], indirect=True)
    def test_a_head_that_stays_on_its_device_is_trained(self, offloaded: nn.Module) -> None:
        model = get_peft_model(offloaded, config())
        loss(model.train()).backward()
        assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def _one_offloaded(module: nn.Module) -> None:
    """accelerate gives the module itself two hooks in one, `SequentialHook`."""
    cpu_offload(module, execution_device=torch.device("cpu"))


def _one_offloaded_with_another_hook(module: nn.Module) -> None:
    _one_offloaded(module)
    add_hook_to_module(module, ModelHook(), append=True)


@pytest.mark.parametrize("offload", [_one_offloaded, _one_offloaded_with_another_hook])
@pytest.mark.parametrize("path", [QUERY, "vit.embeddings.patch_embeddings.projection", "vit.layernorm"])
def test_an_adapter_is_loaded_onto_a_base_with_one_offloaded_module(
    path: str, offload: Callable[[nn.Module], None], tmp_path: Path
) -> None:
    model = adapted(tiny_vit(), modules_to_save=[], bias="with_norms")
    model.save_pretrained(tmp_path)
    base = tiny_vit()
    offload(base.get_submodule(path))
    assert base.get_submodule(path).weight.device.type == "meta"
    loaded = PeftModel.from_pretrained(base, tmp_path)
    layer = layers_of(loaded)[path]
    tensors = [*layer.adapter_parameters("default"), *layer.index_tensors("default")]
    assert {tensor.device.type for tensor in tensors} == {"cpu"}
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=1e-4)
    with loaded.disable_adapter():
        torch.testing.assert_close(logits(loaded), logits(tiny_vit()), atol=1e-5, rtol=1e-4)


def test_a_random_selection_on_a_base_with_one_offloaded_module() -> None:
    base = tiny_vit()
    _one_offloaded(base.get_submodule(QUERY))
    model, there = (adapted(m, importance="random", modules_to_save=[]) for m in (base, tiny_vit()))
    assert selections(model) == selections(there)
    torch.testing.assert_close(logits(model), logits(there), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("hook", [ModelHook(), SequentialHook(), SequentialHook(ModelHook(), ModelHook())])
def test_tensors_stay_beside_a_weight_that_no_hook_brings(hook: ModelHook) -> None:
    base = tiny_mlp().to("meta")
    add_hook_to_module(base.first, hook)
    model = get_peft_model(base, config(), low_cpu_mem_usage=True)
    layer = layers_of(model)["first"]
    assert {p.device.type for p in (*layer.adapter_parameters("default"), layer.fps_columns["default"])} == {"meta"}


def test_parameters_and_buffers_move_together() -> None:
    """Meta is the other device that every machine has."""
    layer = layers_of(adapted(tiny_vit()).to("meta"))[QUERY]
    held = (layer.fps_values, layer.fps_bias, layer.fps_columns, layer.fps_row_counts)
    assert {each["default"].device.type for each in held} == {"meta"}


# --- which modules --------------------------------------------------------------------------------------------------


def targets(model: nn.Module) -> set[str]:
    return set(layers_of(model))


def per_neuron(model: nn.Module, path: str) -> float:
    layer = layers_of(model)[path]
    return layer.fps_values["default"].numel() / layer.shape.neurons


class TestTargets:
    def test_all_but_the_head_by_default(self) -> None:
        block = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2")
        assert targets(adapted(tiny_vit())) == {
            "vit.embeddings.patch_embeddings.projection",
            *(f"vit.layers.{number}.{name}" for number in (0, 1) for name in block),
        }

    def test_exclude_modules_by_names_or_expression(self) -> None:
        left = targets(adapted(tiny_vit(), exclude_modules=["fc1", "vit.layers.0.attention.q_proj", "projection"]))
        assert left == {
            path
            for path in targets(adapted(tiny_vit()))
            if not path.endswith(("fc1", "projection")) and path != "vit.layers.0.attention.q_proj"
        }
        left = targets(adapted(tiny_vit(), exclude_modules=r".*layers\.0\..*"))
        assert left == {path for path in targets(adapted(tiny_vit())) if "layers.0." not in path}

    @pytest.mark.parametrize(
        "options", [{}, {"layers_pattern": "layers"}, {"layers_pattern": ["layers", "blocks"]}], ids=repr
    )
    @pytest.mark.parametrize(("indices", "layer"), [(0, 0), (1, 1), ([1], 1), ((1,), 1)], ids=repr)
    def test_layers_to_transform(self, indices: Any, layer: int, options: dict[str, Any]) -> None:
        model = adapted(tiny_vit(), target_modules=["q_proj", "fc2"], layers_to_transform=indices, **options)
        assert targets(model) == {f"vit.layers.{layer}.attention.q_proj", f"vit.layers.{layer}.mlp.fc2"}

    def test_targets_of_a_saved_adapter_are_those_it_was_made_for(self, tmp_path: Path) -> None:
        options = {"target_modules": ["q_proj", "fc2"], "layers_to_transform": [1], "exclude_modules": ["fc2"]}
        adapted(tiny_vit(), **options).save_pretrained(tmp_path)
        assert targets(PeftModel.from_pretrained(tiny_vit(), tmp_path)) == {"vit.layers.1.attention.q_proj"}

    def test_budget_pattern_gives_modules_their_own_number(self, tmp_path: Path) -> None:
        model = adapted(tiny_vit(), per_neuron=2, budget_pattern={"q_proj": 5, r"layers\.1\..*fc2": 0})
        assert per_neuron(model, "vit.layers.0.attention.q_proj") == 5
        assert per_neuron(model, "vit.layers.1.mlp.fc2") == 0
        assert per_neuron(model, "vit.layers.0.mlp.fc2") == 2
        model.save_pretrained(tmp_path)
        assert selections(PeftModel.from_pretrained(tiny_vit(), tmp_path)) == selections(model)

    def test_budget_pattern_with_a_budget_keeps_the_total(self) -> None:
        base = sum(p.numel() for name, p in tiny_vit().named_parameters() if not name.startswith("classifier"))
        model = adapted(tiny_vit(), budget=0.1, budget_pattern={"q_proj": 0.25})
        assert per_neuron(model, "vit.layers.0.attention.q_proj") == 8  # a quarter of 32 inputs
        trained = sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and "fps_" in name)
        assert 0.1 * base - len(targets(model)) < trained <= 0.1 * base

    @pytest.mark.parametrize("wrong", [{"target_modules": ["nothing"]}, {"budget_pattern": {"nothing": 1}}])
    def test_a_name_without_a_module_is_refused_before_anything_changes(self, wrong: dict[str, Any]) -> None:
        model = tiny_vit()
        with unchanged(model), pytest.raises(ValueError, match="nothing|No modules were targeted"):
            get_peft_model(model, config(**wrong))


class TestBudget:
    def test_too_small_for_the_biases_is_refused_with_numbers_and_ways_out(self) -> None:
        model = tiny_vit()
        base = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("classifier"))
        neurons = 32 + 2 * (4 * 32 + 64 + 32)
        with unchanged(model), pytest.raises(ValueError, match="biases") as error:
            get_peft_model(model, FPSConfig(budget=0.001))
        message = str(error.value)
        share = float(message.split("at least ")[1].split(",")[0])
        get_peft_model(tiny_vit(), config(budget=share))  # is enough
        assert "budget=0.001" in message
        assert f"{int(0.001 * base)} of {base:,} base parameters" in message
        assert f"alone are {neurons - 2 * 32}" in message  # without those of keys
        assert "bias='none'" in message
        assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == set()

    def test_without_biases_it_fits(self) -> None:
        model = adapted(tiny_vit(), budget=0.001, bias="none")
        base = sum(p.numel() for name, p in tiny_vit().named_parameters() if not name.startswith("classifier"))
        trained = sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and "fps_" in name)
        assert 0 < trained <= 0.001 * base

    @pytest.mark.parametrize("options", [{"budget": 0}, {"per_neuron": 0}], ids=repr)
    def test_biases_alone_need_no_calibration(self, options: dict[str, Any]) -> None:
        """BitFit: training it must not warn (warnings are errors here)."""
        model = get_peft_model(tiny_vit(), FPSConfig(**options))
        loss(model.train()).backward()
        assert all(layer.fps_values["default"].numel() == 0 for layer in layers_of(model).values())
        # a softmax does not see what a key's bias adds to all scores of a row
        for path, layer in layers_of(model).items():
            assert [bool(delta.grad.any()) for delta in layer.fps_bias.values()] == [True] * ("k_proj" not in path)


class TestRandomStart:
    """`init_weights=False` draws a change for tests; the adapter's name must not matter."""

    @staticmethod
    def build(name: str, seed: int) -> tuple[dict[str, list[list[int]]], dict[str, bytes]]:
        torch.manual_seed(seed)
        model = get_peft_model(tiny_vit(), config(init_weights=False), name)
        values = {
            f"{path}.{kind}": bits(getattr(layer, kind)[name])
            for path, layer in layers_of(model).items()
            for kind in ("fps_values", "fps_bias")
            if name in getattr(layer, kind)
        }
        return selections(model, name), values

    @pytest.mark.parametrize("name", ["default", "other", "a"])
    def test_is_reproducible_whatever_the_name(self, name: str) -> None:
        assert self.build(name, 7) == self.build("default", 7)

    def test_depends_on_the_seed(self) -> None:
        first, second = self.build("default", 7), self.build("default", 8)
        assert first[0] != second[0]
        assert first[1] != second[1]

    def test_changes_the_result(self) -> None:
        torch.manual_seed(0)
        model = get_peft_model(tiny_vit(), config(init_weights=False)).eval()
        assert all(bool(layer.fps_values["default"].all()) for layer in layers_of(model).values())
        assert bits(logits(model)) != bits(logits(tiny_vit()))


# --- other tenants --------------------------------------------------------------------------------------------------


def test_a_module_with_another_method_s_adapter_is_refused() -> None:
    model = get_peft_model(tiny_vit(), LoraConfig(target_modules=["q_proj"])).base_model.model
    with pytest.raises(ValueError, match=r"q_proj already carries an adapter of another method"):
        inject_adapter_in_model(config(target_modules=["q_proj"]), model, "ours")


class _WithNorm(TinyConv):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        return self.head(torch.relu(self.odd(torch.relu(self.grouped(x)))).mean((2, 3)))


def batch_norm_model() -> _WithNorm:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _WithNorm()


class TestBatchNorm:
    """Running statistics are buffers of the base model: they stay, unless the norm is trained whole."""

    @pytest.mark.parametrize("whole", [None, ["norm"]], ids=["adapted", "whole"])
    def test_they_are_trained_and_saved_with_a_norm_that_is_named_alone(self, whole: Any, tmp_path: Path) -> None:
        model = adapted(batch_norm_model(), modules_to_save=whole).train()
        before = bits(model.base_model.model.norm.running_mean)
        for seed in range(3):
            model(3 * images(seed=seed) + 1).sum().backward()
        model.eval().save_pretrained(tmp_path)
        if whole:
            saved = load_file(tmp_path / "adapter_model.safetensors")
            assert int(saved["base_model.model.norm.num_batches_tracked"]) == 3
        else:
            assert bits(model.base_model.model.norm.running_mean) == before
        loaded = PeftModel.from_pretrained(batch_norm_model(), tmp_path)
        with torch.no_grad():
            assert bits(loaded(images())) == bits(model(images()))

    def test_calibration_does_not_move_them(self) -> None:
        model = get_peft_model(batch_norm_model(), FPSConfig(per_neuron=2)).train()
        before = bits(model.base_model.model.norm.running_mean)
        model.calibrate([images(seed=5)], progress=False)
        assert bits(model.base_model.model.norm.running_mean) == before
        assert model.training


# --- names of an older generation -----------------------------------------------------------------------------------

OLD_NAMES = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def old_name(path: str) -> str:
    """Module path of transformers 4 for one of transformers 5."""
    path = path.replace("vit.layers.", "vit.encoder.layer.")
    for new, old in OLD_NAMES.items():
        if path.endswith(new):
            return path.removesuffix(new) + old
    return path


def saved_under_old_names(model: PeftModel, folder: Path, target_modules: Any = None) -> Path:
    """What the adapter's folder would have been, had it been made under transformers 4."""
    model.save_pretrained(folder)
    file, written = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors = {}
    for key, tensor in load_file(file).items():
        path, _, name = key.removeprefix("base_model.model.").rpartition(".")
        tensors[f"base_model.model.{old_name(path)}.{name}"] = tensor
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})
    content = json.loads(written.read_text())
    record = content["record"]
    record["allocation"] = {old_name(path): sizes for path, sizes in record["allocation"].items()}
    content["target_modules"] = target_modules or sorted(record["allocation"])
    base = tiny_vit()
    weights = {old_name(path): base.get_submodule(path).weight for path in layers_of(model)}
    record["base_fingerprint"] = fingerprint(weights)
    written.write_text(json.dumps(content))
    return folder


class TestOldNames:
    """transformers 5 renamed ViT's modules; adapters of before still find them."""

    @pytest.fixture
    def model(self) -> PeftModel:
        model = adapted(tiny_vit(), per_neuron=2.5)
        perturb_head(model, "default", 3)
        return model

    @pytest.mark.parametrize(
        "target_modules",
        [None, ["query", "key", "value", "dense", "projection"], r"vit\.(embeddings|encoder)\..*"],
        ids=["all paths", "old ends", "old expression"],
    )
    @pytest.mark.parametrize("how", ["from_pretrained", "low memory", "second", "transformers"])
    def test_an_old_adapter_gives_the_right_result(
        self, how: str, target_modules: Any, model: PeftModel, tmp_path: Path
    ) -> None:
        folder, base = saved_under_old_names(model, tmp_path, target_modules), tiny_vit()
        if how == "second":
            loaded: nn.Module = adapted(base, "first", target_modules=["q_proj"])
            loaded.load_adapter(folder, "default")
            loaded.set_adapter("default")
        elif how == "transformers":
            base.load_adapter(folder)
            loaded = base
        else:
            loaded = PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=how == "low memory")
        assert selections(loaded) == selections(model)
        assert bits(logits(loaded)) == bits(logits(model))

    def test_it_is_saved_under_the_present_names(self, model: PeftModel, tmp_path: Path) -> None:
        folder = saved_under_old_names(model, tmp_path / "old")
        PeftModel.from_pretrained(tiny_vit(), folder).save_pretrained(tmp_path / "new")
        model.save_pretrained(tmp_path / "expected")
        new, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("new", "expected"))
        assert {key: bits(tensor) for key, tensor in new.items()} == {
            key: bits(tensor) for key, tensor in expected.items()
        }
        loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path / "new")
        assert bits(logits(loaded)) == bits(logits(model))

    def test_a_new_adapter_that_is_asked_for_by_old_names_is_refused(self) -> None:
        with pytest.raises(ValueError, match="No modules were targeted"):
            get_peft_model(tiny_vit(), config(target_modules=["query", "value"]))


# --- base weights ---------------------------------------------------------------------------------------------------


def test_no_verb_but_merge_writes_a_base_weight() -> None:
    model = two_adapters()
    before = base_bytes(model)
    model.set_adapter("second")
    loss(model.train()).backward()
    model.disable_adapter_layers()
    model.enable_adapter_layers()
    model.calibrate(adapter_name="first", discard_values=True, progress=False)
    model.delete_adapter("first")
    held = base_bytes(model)
    assert held == {name: before[name] for name in held}
    assert before == base_bytes(adapted(tiny_vit()))
