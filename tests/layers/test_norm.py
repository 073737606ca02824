"""`bias="with_norms"`: bias deltas in LayerNorms, as BitFit trains them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertForMaskedLM, ViltConfig, ViltForQuestionAnswering

from peft_fps.layers.norm import Norm
from peft_fps.selection import NormSelection
from tests.layers.comparisons import (
    COMPILES,
    activate,
    assert_adapter_gradients,
    assert_equal,
    several_adapters,
    trained_gradients,
)
from tests.support.helpers import (
    adapted,
    assert_threads_do_not_mix,
    base_bytes,
    bits,
    config,
    dense_change,
    fill,
    image_batches,
    images,
    layers_of,
    normal,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_mlp,
    tiny_vit,
    tokens,
    unchanged,
    with_fields,
)
from tests.support.helpers import dense_reference as reference
from tests.support.reading_nets import READERS, TOKENS, WIDTH, net, saved
from tests.support.reading_nets import inputs as leaf_inputs


pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")

NORM = "vit.layers.0.layernorm_before"


# --- models, and what is expected of them ---------------------------------------------------------------------------


def vit_output(model: nn.Module, seed: int = 0) -> Tensor:
    dtype = next(parameter.dtype for name, parameter in model.named_parameters() if "q_proj" in name)
    return model(pixel_values=images(seed=seed).to(dtype)).logits


def token_output(model: nn.Module, seed: int = 0) -> Tensor:
    return model(input_ids=tokens(seed=seed)).logits


MODELS: dict[str, tuple[Callable[[], Any], Callable[..., Tensor], set[str], str]] = {
    "vit": (
        tiny_vit,
        vit_output,
        {f"vit.layers.{i}.layernorm_{place}" for i in range(2) for place in ("before", "after")} | {"vit.layernorm"},
        "classifier.",
    ),
    "bert": (
        tiny_bert,
        token_output,
        {"bert.embeddings.LayerNorm"}
        | {f"bert.encoder.layer.{i}.{part}output.LayerNorm" for i in range(2) for part in ("attention.", "")},
        "classifier.",
    ),
    "gpt2": (
        tiny_gpt2,
        token_output,
        {f"transformer.h.{i}.ln_{j}" for i in range(2) for j in (1, 2)} | {"transformer.ln_f"},
        "lm_head.",
    ),
}
ALL = pytest.mark.parametrize("kind", list(MODELS))


def with_norms(base: nn.Module, adapter_name: str = "default", **options: Any) -> PeftModel:
    return adapted(base, adapter_name, **{"bias": "with_norms", "modules_to_save": [], **options})


def norms_of(model: nn.Module) -> set[str]:
    return {path for path, layer in layers_of(model).items() if isinstance(layer, Norm)}


def bias_parameters(model: nn.Module, head: str, keys: bool = False) -> dict[str, nn.Parameter]:
    """What BitFit trains but the head: every parameter whose name contains "bias", those of keys only if asked for."""
    left_out = (".k_proj.bias", ".key.bias") if not keys else ()
    found = {name: p for name, p in model.named_parameters() if "bias" in name and not name.startswith(head)}
    return {name: p for name, p in found.items() if not name.endswith(left_out)}


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


# --- which modules, and how many parameters -------------------------------------------------------------------------


@ALL
def test_all_layer_norms_outside_the_head_are_adapted(kind: str) -> None:
    build, _, expected, _ = MODELS[kind]
    model = with_norms(build())
    assert norms_of(model) == expected
    for path in expected:
        layer = layers_of(model)[path]
        assert layer.neurons == layer.base_layer.bias.numel()
        assert set(trained(layer)) == {"fps_bias.default"}
        assert set(layer.state_dict()) == {"fps_bias.default", "base_layer.weight", "base_layer.bias"}
    assert set(layers_of(model)) - expected == set(layers_of(adapted(build(), modules_to_save=[])))


@ALL
def test_with_no_budget_the_trained_parameters_are_those_of_bitfit(kind: str) -> None:
    build, _, _, head = MODELS[kind]
    model, expected = with_norms(build(), budget=0), bias_parameters(build(), head)
    assert sum(p.numel() for p in trained(model).values()) == sum(p.numel() for p in expected.values())
    report = model.selection_report()
    assert (report.entries, report.biases) == (0, sum(p.numel() for p in expected.values()))
    found = {name.replace(".fps_bias.default", ".bias").removeprefix("base_model.model.") for name in trained(model)}
    assert {name for name in found if "fps_" not in name} == set(expected)


VIT = MODELS["vit"][2]
LAST = {"vit.layers.1.layernorm_before", "vit.layers.1.layernorm_after"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"bias": "none"}, set()),
        ({"bias": "all"}, set()),
        ({"exclude_modules": ["layernorm"]}, VIT - {"vit.layernorm"}),
        ({"exclude_modules": r".*layernorm.*"}, set()),
        ({"target_modules": None, "layers_to_transform": 1}, LAST),
        ({"target_modules": ["q_proj"], "layers_to_transform": 1}, LAST),
        ({"target_modules": "all-linear", "layers_to_transform": 1}, LAST),
        ({"modules_to_save": ["vit.layernorm", "classifier"]}, VIT - {"vit.layernorm"}),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",  # sets have no order,
)
def test_norms_are_adapted_only_on_request_and_only_where_asked(options: dict[str, Any], expected: set[str]) -> None:
    assert norms_of(with_norms(tiny_vit(), **options)) == expected


def test_targets_stay_as_they_were_given() -> None:
    model = with_norms(tiny_vit(), target_modules=["q_proj"])
    assert model.peft_config["default"].target_modules == {"q_proj"}
    assert norms_of(model) == VIT


def test_the_head_s_norms_are_left_out() -> None:
    """A new head's, that is; those around a language model's output embeddings come from the checkpoint."""
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = BertForMaskedLM(BertConfig(vocab_size=20, **shape))
    assert isinstance(base.cls.predictions.transform.LayerNorm, nn.LayerNorm)
    assert {path.split(".")[0] for path in norms_of(with_norms(base))} == {"bert", "cls"}
    base = ViltForQuestionAnswering(ViltConfig(vocab_size=20, image_size=16, patch_size=8, **shape))
    assert isinstance(base.classifier[1], nn.LayerNorm)
    assert {path.split(".")[0] for path in norms_of(adapted(base, bias="with_norms"))} == {"vilt"}


def test_norms_without_a_bias_are_left_alone() -> None:
    base = nn.Sequential(nn.LayerNorm(4, bias=False), nn.Linear(4, 4), nn.LayerNorm(4, elementwise_affine=False))
    assert set(layers_of(with_norms(base))) == {"1"}
    assert norms_of(with_norms(tiny_llama())) == set()


def test_one_config_serves_models_with_and_without_norms() -> None:
    ours = config(bias="with_norms", modules_to_save=[])
    for build, expected in ((tiny_vit, VIT), (tiny_mlp, set()), (tiny_gpt2, MODELS["gpt2"][2])):
        assert norms_of(get_peft_model(build(), ours)) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["nowhere"]}, "Target modules {'nowhere'} not found"),  # peft's own words
        *(
            (
                {"bias": bias, "target_modules": ["q_proj", "layernorm"]},
                r"layernorm is a LayerNorm, expected one of Linear, transformers' Conv1D, Conv1d,",
            )
            for bias in ("none", "all")
        ),
        ({"budget": 0.01}, "biases of the targeted modules alone are"),
        ({"budget_pattern": {"layernorm": 2.0}}, "'layernorm' matches none"),
    ],
    ids=str,
)
def test_what_no_norm_can_follow_is_refused(options: dict[str, Any], message: str) -> None:
    base = tiny_vit()
    with unchanged(base), pytest.raises(ValueError, match=message):
        with_norms(base, **options)


def test_a_norm_without_a_bias_as_target_is_refused() -> None:
    with pytest.raises(ValueError, match="0 is a LayerNorm, expected one of"):
        with_norms(nn.Sequential(nn.LayerNorm(4, bias=False), nn.Linear(4, 4)), target_modules=["0", "1"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda vit: nn.utils.parametrize.register_parametrization(vit.layernorm, "bias", nn.Tanh()),
            r"vit\.layernorm: its bias is computed .*exclude_modules",
        ),
        (
            lambda vit: setattr(vit.layernorm, "bias", vit.layers[0].layernorm_before.bias),
            r"vit\.layernorm\.bias.*layernorm_before.*merging would change",
        ),
        (
            lambda vit: setattr(vit.layers[1], "layernorm_after", vit.layers[1].layernorm_before),
            "layernorm_before and .*layernorm_after are the same module",
        ),
    ],
    ids=["computed", "tied", "under-two-names"],
)
def test_a_bias_that_is_not_the_norm_s_own_is_refused_unless_it_is_excluded(
    change: Callable[[Any], Any], message: str
) -> None:
    base = tiny_vit()
    change(base.vit)
    with pytest.raises(ValueError, match=message):
        with_norms(base)
    assert norms_of(with_norms(base, exclude_modules=r".*layernorm.*")) == set()


# --- budget ---------------------------------------------------------------------------------------------------------


def test_biases_of_norms_count_in_the_budget() -> None:
    base, budget = tiny_vit(), 0.1
    size = sum(p.numel() for name, p in base.named_parameters() if not name.startswith("classifier."))
    report = with_norms(base, budget=budget).selection_report()
    weights = [layer for layer in report.layers if not isinstance(layer, NormSelection)]
    assert len(report.layers) - len(weights) == 5
    assert int(budget * size) - len(weights) < report.trained <= int(budget * size)
    assert report.entries < adapted(tiny_vit(), budget=budget).selection_report().entries
    # every neuron of a module with weights has the same number of entries
    per_neuron = [layer.entries / layer.neurons for layer in weights]
    assert max(per_neuron) - min(per_neuron) <= max(1 / layer.neurons for layer in weights)


def test_entries_per_neuron_leave_norms_without_entries() -> None:
    report = with_norms(tiny_vit(), per_neuron=3).selection_report()
    assert {layer.entries for layer in report.layers if isinstance(layer, NormSelection)} == {0}
    assert {layer.entries / layer.neurons for layer in report.layers if not isinstance(layer, NormSelection)} == {3}


# --- outputs, gradients, training -----------------------------------------------------------------------------------


@ALL
def test_a_new_adapter_changes_nothing(kind: str) -> None:
    build, output, _, _ = MODELS[kind]
    assert bits(output(with_norms(build(), filled=False))) == bits(output(build()))


@ALL
@pytest.mark.parametrize("options", [{"budget": 0}, {"per_neuron": 2}], ids=str)
def test_outputs_are_those_of_changed_biases(kind: str, options: dict[str, Any]) -> None:
    build, output, _, _ = MODELS[kind]
    model = with_norms(build(), **options)
    expected = output(reference(build(), model))
    torch.testing.assert_close(output(model), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(output(model), output(build()), atol=1e-2)


@ALL
@pytest.mark.parametrize("saved_inputs", ["rebuild", "columns"])
def test_gradients_are_those_of_the_base_model_s_biases(kind: str, saved_inputs: str) -> None:
    build, output, _, head = MODELS[kind]
    model = with_norms(build(), saved_inputs=saved_inputs, per_neuron=3)
    plain = reference(build(), model).requires_grad_()
    output(model).square().sum().backward()
    output(plain).square().sum().backward()
    assert [name for name, p in trained(model).items() if p.grad is None] == []  # or DistributedDataParallel stops
    with_bias = {f"{path}.bias" for path, layer in layers_of(model).items() if "default" in layer.fps_bias}
    assert with_bias == set(bias_parameters(plain, head))
    assert_adapter_gradients(model, plain, atol=1e-4, rtol=1e-4)


@ALL
def test_training_is_training_all_biases(kind: str) -> None:
    build, output, _, head = MODELS[kind]
    model, plain = with_norms(build(), filled=False, budget=0), build().requires_grad_(False)
    biases = bias_parameters(plain, head, keys=True).values()  # those of keys do not matter
    for parameter in biases:
        parameter.requires_grad_()
    steps = [torch.optim.SGD(found, lr=0.5) for found in (trained(model).values(), biases)]
    start = output(model).detach()
    for seed in range(4):
        for module, optimizer in zip((model, plain), steps, strict=True):
            optimizer.zero_grad()
            output(module, seed).square().mean().backward()
            optimizer.step()
        torch.testing.assert_close(output(model), output(plain), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(output(model), start, atol=1e-3)


# --- inputs that neighbours read ------------------------------------------------------------------------------------


def gradients(model: Any, step: Callable[[nn.Module, Tensor], Tensor]) -> dict[str, Tensor]:
    x = leaf_inputs()
    model.zero_grad()
    step(model, x).backward()
    assert x.grad is not None
    return {"input": x.grad} | trained_gradients(model)


def plain_step(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum()


STEPS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "plain": plain_step,
    "checkpoint": lambda model, x: checkpoint(model, x, use_reentrant=False).square().sum(),
    "reentrant checkpoint": lambda model, x: checkpoint(model, x, use_reentrant=True).square().sum(),
    "two batches": lambda model, x: plain_step(model, x) + plain_step(model, x.flip(0) + 1),
}


def normed(saved_inputs: str, norm: Callable[[], nn.Module] = lambda: nn.LayerNorm(WIDTH), **options: Any) -> Any:
    """A norm with a bias delta, and three adapted layers that read its output."""
    options = {"target_modules": READERS, "per_neuron": 2, "saved_inputs": saved_inputs, **options}
    return with_norms(net(norm), **options)


@pytest.mark.parametrize("step", list(STEPS))
def test_rebuilt_inputs_give_the_same_gradients_bit_for_bit(step: str) -> None:
    found, expected = (gradients(normed(choice), STEPS[step]) for choice in ("rebuild", "columns"))
    assert len([name for name in found if "fps_values" in name]) == 3
    assert_equal(found, expected)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "disabled": lambda base: [setattr(layer, "_disable_adapters", True) for layer in layers_of(base).values()],
    "hooked": lambda base: base.middle.base_layer.register_forward_hook(lambda module, args, output: output * 2),
    "trained": lambda base: base.middle.fps_bias["default"].data.add_(1),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("choice", ["rebuild", "columns"])
def test_what_becomes_of_the_adapter_before_backward_does_not_matter(choice: str, change: str) -> None:
    def step(model: Any, x: Tensor) -> Tensor:
        result = plain_step(model, x)
        CHANGES[change](model.base_model.model)
        return result

    found, expected = gradients(normed(choice), step), gradients(normed(choice), plain_step)
    assert len(found) == 1 + 1 + 3 + 2  # input, norm, values, biases
    assert_equal(found, expected)


@pytest.mark.parametrize("choice", ["rebuild", "columns"])
@pytest.mark.parametrize("place", ["y", "source"])
def test_a_change_in_place_before_the_readers_is_seen(choice: str, place: str) -> None:
    """The readers' gradients are those of what they read, or autograd refuses."""

    def between(source: Tensor, y: Tensor) -> Tensor:
        if place == "y":
            return y.mul_(2)
        with torch.no_grad():
            source.copy_(source.flip(-1))
        return y

    model = normed(choice)
    model.base_model.model.between = between
    plain = reference(net(lambda: nn.LayerNorm(WIDTH)), model).requires_grad_()
    plain.between = between if place == "y" else lambda source, y: y
    readers = [layers_of(model)[name] for name in READERS]
    values = [reader.fps_values["default"] for reader in readers]
    weights = [plain.get_submodule(name).weight for name in READERS]
    found = torch.autograd.grad(plain_step(model, leaf_inputs()), values)
    expected = torch.autograd.grad(plain_step(plain, leaf_inputs()), weights)
    for reader, grad, dense in zip(readers, found, expected, strict=True):
        torch.testing.assert_close(grad, dense[dense_change(reader) != 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", ["all", "with_norms"])
def test_rebuilt_inputs_cost_no_memory(bias: str) -> None:
    model = adapted(net(lambda: nn.LayerNorm(WIDTH)), target_modules=READERS, bias=bias)
    plain = net(lambda: nn.LayerNorm(WIDTH)).requires_grad_(False)
    sum_of_biases = 4 * WIDTH if bias == "with_norms" else 0
    assert saved(model) - saved(plain) <= sum_of_biases
    assert saved(normed("columns")) - saved(plain) >= 4 * TOKENS[0] * TOKENS[1] * 2


def test_an_input_that_needs_no_gradient_is_rebuilt_too() -> None:
    x, found = normal(3, 6), []
    for choice in ("rebuild", "columns"):
        torch.manual_seed(0)
        model = with_norms(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 5)), saved_inputs=choice)
        model(x).square().sum().backward()
        found.append(trained_gradients(model))
    assert len(found[1]) == 3
    assert_equal(*found)


def watched(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if module._forward_hooks}


def test_the_adapted_norm_alone_is_free_of_hooks() -> None:
    model = adapted(net(lambda: nn.LayerNorm(WIDTH)), "first", target_modules=READERS)
    base = model.base_model.model
    assert watched(base) == {"middle"}
    model.add_adapter("second", config(bias="with_norms", target_modules=READERS))
    assert watched(base) == set()
    assert watched(model.unload()) == set()


# --- an adapter's life ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_merged_norm_computes_the_same_bit_for_bit(dtype: torch.dtype) -> None:
    model, x = with_norms(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)).to(dtype)), normal(5, 8, dtype=dtype)
    norm = layers_of(model)["0"]
    assert norm.fps_bias["default"].dtype == torch.promote_types(dtype, torch.float32)
    expected = norm(x)
    exact = F.layer_norm(x.double(), (8,)) + norm.fps_bias["default"].double()  # a new norm has weight 1 and bias 0
    torch.testing.assert_close(expected.double(), exact, atol=5e-2 if dtype.itemsize == 2 else 1e-5, rtol=1e-2)
    before = base_bytes(model)
    model.merge_adapter()
    assert expected.dtype == dtype
    assert torch.equal(norm(x), expected)
    model.unmerge_adapter()
    assert base_bytes(model) == before


def three_adapters() -> PeftModel:
    """All but the second with norms."""
    second = {"bias": "all", "target_modules": ["q_proj", "fc2"]}
    each = {"first": {}, "second": second, "third": {"target_modules": ["v_proj"]}}
    return several_adapters(tiny_vit(), each, bias="with_norms", modules_to_save=[])


def test_several_adapters_are_switched_summed_disabled_and_deleted() -> None:
    model = three_adapters()
    for names in (("first",), ("second",), ("third",), ("first", "second", "third")):
        activate(model, *names)
        expected = vit_output(reference(tiny_vit(), model, names))
        torch.testing.assert_close(vit_output(model), expected, atol=1e-4, rtol=1e-4)
        assert {name.rpartition(".")[2] for name in trained(model)} == set(names)
        with model.disable_adapter():
            assert torch.equal(vit_output(model), vit_output(tiny_vit()))
    model.set_adapter("third")
    model.delete_adapter("first")
    activate(model, "second")
    expected = vit_output(reference(tiny_vit(), model, ("second",)))
    torch.testing.assert_close(vit_output(model), expected, atol=1e-5, rtol=1e-5)
    assert not any(".first" in name for name in model.state_dict())


@pytest.mark.filterwarnings("ignore:Already following adapters were merged first")
def test_adapters_are_merged_one_after_the_other() -> None:
    model = three_adapters()
    before = base_bytes(model)
    activate(model, "first", "second", "third")
    expected = vit_output(model)
    model.merge_adapter(["first", "second"])
    model.merge_adapter(["third"])
    torch.testing.assert_close(vit_output(model), expected, atol=1e-4, rtol=1e-4)
    model.unmerge_adapter()
    assert base_bytes(model) == before


@pytest.mark.parametrize("choice", ["rebuild", "columns"])
def test_gradients_of_summed_adapters(choice: str) -> None:
    model = normed(choice, target_modules=READERS)
    model.add_adapter("second", config(bias="with_norms", target_modules=READERS, importance="random"))
    fill(model, "second", seed=2)
    activate(model, "default", "second")
    plain = reference(net(lambda: nn.LayerNorm(WIDTH)), model, ("default", "second")).requires_grad_()
    plain_step(model, leaf_inputs()).backward()
    plain_step(plain, leaf_inputs()).backward()
    assert_adapter_gradients(model, plain, "default", "second", atol=1e-4, rtol=1e-4)


def test_random_changes_on_request() -> None:
    model = with_norms(tiny_vit(), filled=False, init_weights=False)
    assert all(bool((layers_of(model)[path].fps_bias["default"] != 0).all()) for path in norms_of(model))


def test_calibration_passes_norms_by() -> None:
    options = {"importance": "activation", "filled": False, "modules_to_save": []}
    model, without = with_norms(tiny_vit(), **options), adapted(tiny_vit(), **options)
    for each in (model, without):
        each.calibrate(image_batches(), progress=False)
    for path, layer in layers_of(without).items():
        for held in ("fps_columns", "fps_row_counts"):
            assert torch.equal(getattr(layers_of(model)[path], held)["default"], getattr(layer, held)["default"])
    for path in norms_of(model):
        assert layers_of(model)[path].fps_bias["default"].tolist() == [0] * 32
    report = model.selection_report()
    rows = {
        row.module: (row.entries, row.biases, row.share) for row in report.layers if isinstance(row, NormSelection)
    }
    assert rows == dict.fromkeys(norms_of(model), (0, 32, 0.0))
    assert NORM in str(report)


def test_calibration_refuses_to_discard_trained_biases_of_norms() -> None:
    model = with_norms(tiny_vit(), filled=False)
    layers_of(model)[NORM].fps_bias["default"].data[0] = 1
    with pytest.raises(ValueError, match=f"{NORM}.*holds trained changes"):
        model.calibrate(progress=False)


# --- saving and loading ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda saved: saved.update(bias="all"), "is a LayerNorm, expected one of"),
        (
            lambda saved: saved["record"]["allocation"][NORM].update(neurons=31),
            f"{NORM}: found 32 neurons with 0 inputs, expected 31",
        ),
    ],
    ids=["without-norms", "of-another-size"],
)
def test_an_allocation_that_does_not_fit_the_norms_is_refused(
    change: Callable[[Any], None], message: str, tmp_path: Path
) -> None:
    with_norms(tiny_vit()).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    change(saved)
    (tmp_path / "adapter_config.json").write_text(json.dumps(saved))
    base = tiny_vit()
    with unchanged(base), pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, tmp_path)


@pytest.mark.parametrize("others", [False, True])
def test_a_failed_load_leaves_the_norms_as_they_were(others: bool, tmp_path: Path) -> None:
    with_norms(tiny_vit()).save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors[f"base_model.model.{NORM}.fps_bias"][3] = torch.nan
    save_file(tensors, weights, metadata={"format": "pt"})
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(with_fields(json.loads(config.read_text()), tensors_sha256=None)))
    base = tiny_vit()
    model = adapted(base, "first", target_modules=["q_proj"], modules_to_save=[]) if others else base
    hooks = watched(base)
    assert bool(hooks) == others
    with pytest.raises(ValueError, match="NaN"):
        model.load_adapter(tmp_path, "broken") if others else PeftModel.from_pretrained(base, tmp_path)
    assert norms_of(base) == set()
    assert watched(base) == hooks


def test_values_that_were_not_loaded_are_refused() -> None:
    model = get_peft_model(tiny_vit(), config(bias="with_norms", budget=0, modules_to_save=[]), low_cpu_mem_usage=True)
    with pytest.raises(ValueError, match="layernorm_before.*meta"):
        layers_of(model)[NORM](normal(2, 32))


def test_a_state_dict_of_an_earlier_version_is_loaded() -> None:
    """It holds the tensors of a module without entries for a norm too."""
    model, other = with_norms(tiny_vit()), with_norms(tiny_vit())
    fill(other, seed=5)
    state = other.state_dict()
    for path in norms_of(other):
        key = f"base_model.model.{path}."
        state[f"{key}fps_values.default"] = torch.empty(0)
        state[f"{key}fps_columns.default"] = torch.empty(0, dtype=torch.int32)
        state[f"{key}fps_row_counts.default"] = torch.zeros(32, dtype=torch.int32)
    model.load_state_dict(state)
    assert torch.equal(vit_output(model), vit_output(other))


# --- other norms, and other ways to call them -----------------------------------------------------------------------


class ChannelsFirst(nn.LayerNorm):
    """As in ConvNeXt: normalises the second dimension of images."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Float32Norm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


class Inherited(nn.LayerNorm):
    pass


KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "plain": (lambda: nn.LayerNorm(5), (2, 3, 5)),
    "several dimensions": (lambda: nn.LayerNorm((3, 5)), (2, 3, 5)),
    "inherited": (lambda: Inherited(5), (2, 3, 5)),
    "float32": (lambda: Float32Norm(5), (2, 3, 5)),
    "channels first": (lambda: ChannelsFirst(5), (2, 5, 4, 5)),
    "eps": (lambda: nn.LayerNorm(5, eps=0.5), (2, 5)),
}


class Around(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.other = norm, nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


def around(kind: str) -> Around:
    torch.manual_seed(0)
    norm = KINDS[kind][0]()
    with torch.no_grad():
        norm.weight.add_(normal(*norm.weight.shape, seed=3))
        norm.bias.add_(normal(*norm.bias.shape, seed=4))
    return Around(norm)


def forward_put_over(base: Around) -> None:
    own = base.norm.forward
    base.norm.forward = lambda x: own(x)


WAYS: dict[str, Callable[[Around], Any]] = {
    "bare": lambda base: None,
    "hooked": lambda base: base.norm.register_forward_hook(lambda module, args, output: output * 1),
    "forward": forward_put_over,
    "offloaded": lambda base: cpu_offload(base, execution_device=torch.device("cpu")),
}


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_of_norm_in_every_way(kind: str, way: str) -> None:
    base = around(kind)
    WAYS[way](base)
    model, x = with_norms(base), normal(*KINDS[kind][1]).requires_grad_()
    layer, plain = layers_of(model)["norm"], reference(around(kind), model)
    y = x.detach().clone().requires_grad_()
    found, expected = model(x), plain(y)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    (found * normal(*found.shape, seed=9)).sum().backward()
    (expected * normal(*found.shape, seed=9)).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, atol=1e-5, rtol=1e-5)
    grad = layer.fps_bias["default"].grad.reshape(plain.norm.bias.shape)
    torch.testing.assert_close(grad, plain.norm.bias.grad, atol=1e-5, rtol=1e-5)
    with model.disable_adapter():
        assert torch.equal(model(x), around(kind)(x))
    if way != "offloaded":
        before = base_bytes(model)
        model.merge_adapter()
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
        if way != "forward":  # which goes on reading the base layer itself
            with model.disable_adapter():
                assert torch.equal(model(x), around(kind)(x))
        model.unmerge_adapter()
        assert base_bytes(model) == before
        assert layer.get_delta_weight("default").tolist() == torch.zeros_like(layer.weight).tolist()


@pytest.mark.parametrize("way", ["bare", "hooked"])
@pytest.mark.parametrize("kind", ["plain", "several dimensions", "channels first"])
def test_under_autocast_norms_compute_as_the_base_does(kind: str, way: str) -> None:
    base = around(kind)
    WAYS[way](base)
    model, x = with_norms(base), normal(*KINDS[kind][1])
    for seen in (x, x.bfloat16()):
        with torch.autocast(torch.get_default_device().type, torch.bfloat16):
            found, expected = model(seen), reference(around(kind), model)(seen)
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, atol=2e-2 if seen.dtype == torch.bfloat16 else 1e-5, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("choice", ["rebuild", "columns"])
def test_half_precision_models_train_float32_biases(choice: str, dtype: torch.dtype) -> None:
    model = with_norms(tiny_vit().to(dtype), saved_inputs=choice)
    plain = reference(tiny_vit(), model).requires_grad_()
    vit_output(model).float().square().sum().backward()
    vit_output(plain).square().sum().backward()
    for path in norms_of(model):
        bias = layers_of(model)[path].fps_bias["default"]
        assert bias.dtype == bias.grad.dtype == torch.float32
        expected = plain.get_submodule(path).bias.grad
        assert float((bias.grad - expected).norm()) <= 0.1 * float(expected.norm()), path


@COMPILES
@pytest.mark.parametrize("kind", ["plain", "channels first"])
@pytest.mark.parametrize("warm", [True, False])
def test_compiled_models_compute_the_same_without_a_graph_break(kind: str, warm: bool) -> None:
    model, x = with_norms(around(kind)), normal(*KINDS[kind][1])
    expected = copy.deepcopy(model)(x)
    if warm:
        model(x)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=warm)
    result = compiled(x)
    torch.testing.assert_close(result, expected)
    result.square().sum().backward()
    found = layers_of(model)["norm"].fps_bias["default"].grad
    dims = [d for d in range(x.dim()) if d != (1 if kind == "channels first" else x.dim() - 1)]
    torch.testing.assert_close(found, (2 * expected).sum(dims))


@pytest.mark.parametrize("kind", ["plain", "channels first"])
def test_forwards_in_two_threads(kind: str) -> None:
    assert_threads_do_not_mix(with_norms(around(kind)), [normal(*KINDS[kind][1], seed=seed) for seed in range(2)])


def test_the_wrapper_shows_the_norm_s_sizes() -> None:
    norm = layers_of(with_norms(around("several dimensions")))["norm"]
    assert (norm.normalized_shape, norm.eps, norm.elementwise_affine) == ((3, 5), 1e-5, True)
    assert norm.weight.shape == norm.bias.shape == (3, 5)
