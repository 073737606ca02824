"""Adapters beside quantised weights: exact, trained as any other, and merged where the weight can be written back."""

import copy
import gc
import weakref
from collections.abc import Callable
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from peft_fps import FPSConfig, Selection
from peft_fps.base.quantisation import put, requantised
from peft_fps.layers import quantised_linear
from peft_fps.layers.fps_layer import FPSLayer
from peft_fps.layers.quantised_linear import QuantisedLinear
from peft_fps.targets.base_parameters import count_base_parameters
from tests.layers.comparisons import activate, several_adapters
from tests.support.helpers import (
    adapted,
    config,
    fill,
    layers_of,
    normal,
    selected_columns,
    tiny_mlp,
    tokens,
    unchanged,
)
from tests.support.quantised_bases import (
    KINDS,
    dense,
    library,
    plain_bert,
    quantised,
    quantised_layer,
    stored_bytes,
    tolerance,
)
from tests.training.trainers import QUIET


exactly = partial(torch.testing.assert_close, rtol=0, atol=0)


def tokenised(count: int = 4, seed: int = 0) -> Tensor:
    return tokens(count, 8, seed=seed)


def labelled() -> dict[str, Tensor]:
    return {"input_ids": tokenised(), "labels": torch.tensor([0, 1, 2, 0])}


def change(layer: FPSLayer, names: tuple[str, ...] = ("default",)) -> Tensor:
    """The sum of the adapters' ΔW `(neurons, inputs)`, entry by entry."""
    total = torch.zeros(layer.shape.neurons, layer.shape.inputs)
    for name in names:
        values = iter(layer.fps_values[name].detach().tolist())
        for row, columns in enumerate(selected_columns(layer, name)):
            for column in columns:
                total[row, column] += next(values)
    return total


def beside(base: nn.Module, model: nn.Module, names: tuple[str, ...] = ("default",)) -> dict[str, nn.Parameter]:
    """Add the adapters' dense changes to what the layers of another quantised copy return; gives these, by path."""
    changes = {}
    for path, layer in layers_of(model).items():
        delta = nn.Parameter(change(layer, names))
        bias = sum(layer.fps_bias[name].detach() for name in names if name in layer.fps_bias)

        def add(_: Any, inputs: Any, output: Tensor, delta: Tensor = delta, bias: Any = bias) -> Tensor:
            return output + (inputs[0] @ delta.t() + bias)

        base.get_submodule(path).register_forward_hook(add)
        changes[path] = delta
    return changes


# --- computing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_sparse_part_is_added_exactly_and_trained(kind: str) -> None:
    plain = plain_bert()
    reference, model = quantised(kind, plain), adapted(quantised(kind, plain), per_neuron=3)
    changes = beside(reference, model)
    reference.classifier.load_state_dict(model.classifier.modules_to_save.default.state_dict())
    assert all(type(layer) is QuantisedLinear for layer in layers_of(model).values())
    assert len(changes) == 7  # all linear layers but the head
    expected, found = reference(**labelled()), model(**labelled())
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    expected.loss.backward()
    found.loss.backward()
    for path, layer in layers_of(model).items():
        gradient: Any = changes[path].grad
        by_entry = [gradient[row, column] for row, c in enumerate(selected_columns(layer)) for column in c]
        torch.testing.assert_close(layer.fps_values["default"].grad, torch.stack(by_entry), rtol=1e-3, atol=1e-5)
        assert {parameter.dtype for parameter in layer.adapter_parameters("default")} == {torch.float32}


@pytest.mark.parametrize("kind", KINDS)
def test_no_forward_or_backward_forms_a_dense_weight(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(quantised(kind, plain_bert())).train()
    for name in ("dense_weight", "dense_delta"):
        monkeypatch.setattr(quantised_linear, name, None)  # a call would raise
    model(**labelled()).loss.backward()
    assert model.base_model.model.bert.pooler.dense.fps_values["default"].grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["8bit", "4bit", "torchao"])
def test_a_half_precision_base(kind: str) -> None:
    """Values stay float32, and the change is as exact as the output can tell."""
    plain = plain_bert().bfloat16()
    reference = quantised(kind, plain, dtype=torch.bfloat16)
    model = adapted(quantised(kind, plain, dtype=torch.bfloat16), per_neuron=3)
    for path, layer in layers_of(model).items():
        assert layer.fps_values["default"].dtype == torch.float32
        x = normal(5, layer.shape.inputs, dtype=torch.bfloat16)
        found, base = layer(x), reference.get_submodule(path)(x)
        assert found.dtype == base.dtype == torch.bfloat16
        bias = layer.bias_delta("default")
        delta = (x.float() @ change(layer).t() + (0 if bias is None else bias)).bfloat16()
        torch.testing.assert_close(found, base + delta, rtol=0.01, atol=0.01)


def test_under_autocast_the_product_is_in_its_dtype() -> None:
    model = adapted(quantised("4bit", plain_bert()), per_neuron=3)
    layer = layers_of(model)["bert.pooler.dense"]
    x = normal(5, 64)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        found, base = layer(x), layer.base_layer(x)
    delta = x.bfloat16() @ change(layer).bfloat16().t() + layer.fps_bias["default"]
    torch.testing.assert_close(found, (base + delta).to(found.dtype), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_several_adapters_and_none(kind: str) -> None:
    plain = plain_bert()
    bare, summed = quantised(kind, plain), quantised(kind, plain)
    model = several_adapters(quantised(kind, plain), {"a": {}, "b": {"per_neuron": 3}}, modules_to_save=[])
    beside(summed, model, ("a", "b"))
    x = tokenised()
    activate(model, "a", "b")
    torch.testing.assert_close(model(x).logits, summed(x).logits, rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        exactly(model(x).logits, bare(x).logits)
    one = [model(x[i : i + 1], adapter_names=[name]).logits for i, name in enumerate(["a", "b", "__base__"])]
    mixed = model(x[:3], adapter_names=["a", "b", "__base__"]).logits
    torch.testing.assert_close(mixed, torch.cat(one), rtol=1e-4, atol=5e-3 if kind == "8bit" else 1e-5)


def test_a_base_that_gives_no_gradient_to_its_input_is_refused_where_one_is_due() -> None:
    """torchao's weights with quantised activations; a silent training would leave out all layers before."""
    library("torchao")
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    base = tiny_mlp(64, 64, 32)
    quantize_(base, Int8DynamicActivationInt8WeightConfig())
    model = adapted(base)
    with torch.no_grad():
        assert torch.isfinite(model(normal(3, 64))).all()
    message = r"last: the quantised base layer \(Int8Tensor\) gives no gradient to its inp"
    with pytest.raises(ValueError, match=message):
        model(normal(3, 64))


def test_the_dense_change_has_the_shape_of_the_dense_weight() -> None:
    model = adapted(quantised("4bit", plain_bert()), per_neuron=3)
    for layer in layers_of(model).values():
        exactly(layer.get_delta_weight("default"), change(layer))


def test_a_copy_of_a_layer_is_independent_of_it() -> None:
    model = adapted(quantised("4bit", plain_bert()))
    x, expected = tokenised(), model(tokenised()).logits
    twin = copy.deepcopy(model)
    fill(twin, seed=9)
    exactly(model(x).logits, expected)


# --- choosing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_budget_counts_the_weights_that_packed_ones_stand_for(kind: str) -> None:
    plain = plain_bert()
    entries = []
    for model in (plain, quantised(kind, plain)):
        assert count_base_parameters(model) == count_base_parameters(plain)
        report = get_peft_model(model, config(budget=0.02)).selection_report()
        entries.append(report.entries)
        assert report.base_parameters == count_base_parameters(plain)
    assert entries[0] == entries[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("importance", ["activation", "magnitude"])
def test_entries_are_those_of_the_dequantised_weight(kind: str, importance: str) -> None:
    plain, data = plain_bert(), [tokenised(seed=seed) for seed in range(2)]
    twin = quantised(kind, plain)
    inputs: dict[str, list[Tensor]] = {}
    model = get_peft_model(quantised(kind, plain), FPSConfig(per_neuron=3, importance=importance, modules_to_save=[]))
    model.calibrate([{"input_ids": batch} for batch in data], progress=False)
    for path in layers_of(model):
        inputs[path] = []

        def note(_: Any, args: Any, path: str = path) -> None:
            inputs[path].append(args[0].reshape(-1, args[0].shape[-1]))

        twin.get_submodule(path).register_forward_pre_hook(note)
    with torch.no_grad():
        for batch in data:
            twin(batch)
    for path, layer in layers_of(model).items():
        driven = torch.cat(inputs[path]).abs().mean(0) if importance == "activation" else torch.ones(1)
        scores = dense(twin.get_submodule(path)).abs() * driven
        chosen = torch.zeros_like(scores, dtype=torch.bool)
        for row, columns in enumerate(selected_columns(layer)):
            assert len(columns) == 3
            chosen[row, columns] = True
        # quantised weights have many equal scores, and 8-bit layers show their weights to a half's precision
        least = scores.masked_fill(~chosen, torch.inf).amin(1)
        most = scores.masked_fill(chosen, -torch.inf).amax(1)
        assert bool((least >= most - 2 * tolerance(kind) * driven.max()).all()), path


def test_one_weight_is_dequantised_at_a_time_and_none_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """And once only, although rows are scored some at a time."""
    model = get_peft_model(quantised("4bit", plain_bert()), FPSConfig(per_neuron=3, modules_to_save=[]))
    alive: list[weakref.ref[Tensor]] = []
    read = quantised_linear.dense_weight

    def watched(base: Any, *args: Any) -> Tensor:
        gc.collect()
        assert not any(reference() is not None for reference in alive)
        dense = read(base, *args)
        alive.append(weakref.ref(dense))
        return dense

    monkeypatch.setattr(quantised_linear, "dense_weight", watched)
    monkeypatch.setattr("peft_fps.selection.candidate.SCORED_ELEMENTS", 64 * 10)
    model.calibrate([{"input_ids": tokenised()}], progress=False)
    gc.collect()
    assert len(alive) == len(layers_of(model))
    assert not any(reference() is not None for reference in alive)


@pytest.mark.parametrize("importance", ["gradient", "fisher", "sensitivity", "movement", "l0"])
def test_importances_that_need_gradients_are_refused(importance: str) -> None:
    model = get_peft_model(quantised("4bit", plain_bert()), FPSConfig(per_neuron=1, importance=importance))
    message = r"query: its weight is quantised \(bnb 4bit\).*Choose importance='activation'.*Nothing was changed"
    with unchanged(model), pytest.raises(ValueError, match=message):
        model.calibrate([labelled()], progress=False)


def test_entries_that_need_gradients_are_selected_on_the_unquantised_model() -> None:
    ours: dict[str, Any] = {"per_neuron": 2, "importance": "gradient", "modules_to_save": []}
    source = get_peft_model(plain_bert(), FPSConfig(**ours))
    source.calibrate([labelled()], progress=False)
    model = get_peft_model(quantised("4bit", plain_bert()), FPSConfig(**ours))
    Selection.of(source).apply(model)
    theirs = layers_of(source)
    for path, layer in layers_of(model).items():
        assert selected_columns(layer) == selected_columns(theirs[path])


def test_a_quantised_head_cannot_be_trained_whole() -> None:
    base = quantised("4bit", plain_bert(), skip=())
    message = (
        r"classifier is to be trained whole.*its weight is quantised.*llm_int8_skip_modules.*modules_to_save=\[\]"
    )
    with unchanged(base), pytest.raises(ValueError, match=message):
        get_peft_model(base, config())
    assert layers_of(get_peft_model(base, config(modules_to_save=[])))


def test_a_quantised_weight_on_the_wrong_side_of_quantisation_is_refused() -> None:
    lib = library("4bit")
    base = nn.Sequential(nn.Linear(64, 64), lib.nn.Linear4bit(64, 32))
    with unchanged(base), pytest.raises(ValueError, match=r"1 \(Linear4bit\) has its weight still in torch.float32"):
        get_peft_model(base, config())


# --- merging --------------------------------------------------------------------------------------------------------


def expected_merge(kind: str, layer: FPSLayer, names: tuple[str, ...]) -> Any:
    """A layer that the library makes of the dequantised weight and the changes, one adapter after the other."""
    base = layer.base_layer
    for name in names:
        plain = nn.Linear(layer.shape.inputs, layer.shape.neurons).requires_grad_(False)
        plain.weight.copy_(quantised_linear.dense_weight(base).float() + change(layer, (name,)))
        plain.bias.copy_(base.bias + layer.fps_bias.get(name, 0))
        base = quantised_layer(kind, plain).eval()
        if kind == "8bit":
            base.state.threshold = layer.base_layer.state.threshold
    return base


def mergeable(kind: str, names: str = "a") -> Any:
    each = {name: {"per_neuron": count} for count, name in enumerate(names, start=2)}
    model = several_adapters(quantised(kind, plain_bert()), each, modules_to_save=[])
    model(tokenised())  # 8-bit layers move their scales when they are first called
    return model


def all_bytes(model: nn.Module) -> dict[str, dict[str, bytes]]:
    for layer in layers_of(model).values():
        quantised_linear.dense_weight(layer.base_layer)  # 8-bit layers note their scales
    return {path: stored_bytes(layer.base_layer) for path, layer in layers_of(model).items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("safe", [False, True], ids=["", "safe"])
def test_merging_quantises_the_sum_and_unmerging_restores_the_base_bit_for_bit(kind: str, safe: bool) -> None:
    model = mergeable(kind)
    before = all_bytes(model)
    with model.disable_adapter():
        base_output = model(tokenised()).logits
    expected = {path: expected_merge(kind, layer, ("a",)) for path, layer in layers_of(model).items()}
    model.merge_adapter(safe_merge=safe)
    for path, layer in layers_of(model).items():
        found, wanted = (quantised_linear.dense_weight(base) for base in (layer.base_layer, expected[path]))
        exactly(found, wanted)
        exactly(layer.base_layer.bias, expected[path].bias)
        x = normal(3, layer.shape.inputs)
        torch.testing.assert_close(layer(x), expected[path](x), rtol=1e-5, atol=5e-3 if kind == "8bit" else 1e-5)
    with model.disable_adapter():
        exactly(model(tokenised()).logits, base_output)
    assert all_bytes(model) != before
    assert not any(p.requires_grad for layer in layers_of(model).values() for p in layer.base_layer.parameters())
    model.unmerge_adapter()
    assert all_bytes(model) == before


@pytest.mark.parametrize("kind", KINDS)
def test_any_adapters_in_any_order_are_unmerged_bit_for_bit(kind: str) -> None:
    model = mergeable(kind, names="ab")
    before = all_bytes(model)
    for order in permutations("ab"):
        expected = {path: expected_merge(kind, layer, order) for path, layer in layers_of(model).items()}
        model.merge_adapter(list(order))
        for path, layer in layers_of(model).items():
            found, wanted = (quantised_linear.dense_weight(base) for base in (layer.base_layer, expected[path]))
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        model.unmerge_adapter()
        assert all_bytes(model) == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_that_others_have_changed_while_merged_is_not_put_back(kind: str) -> None:
    """As LoRA around the layer does: it adds its product, quantises again, and subtracts it later."""
    model = mergeable(kind)
    path, layer = next(iter(layers_of(model).items()))
    assert isinstance(layer, QuantisedLinear)
    model.merge_adapter()
    base = layer.base_layer
    put(base, requantised(base, quantised_linear.dense_weight(base) * 3, layer.quantization_backend))
    changed = all_bytes(model)
    with pytest.raises(ValueError, match=rf"{path}: its quantised weight is not the one .*Nothing was unmerged"):
        model.unmerge_adapter()
    assert all_bytes(model) == changed
    assert all(each.merged for each in layers_of(model).values())


@pytest.mark.parametrize("kind", KINDS)
def test_merge_and_unload_gives_a_plain_quantised_model_and_unload_restores_the_base(kind: str) -> None:
    model, twin, plain = mergeable(kind), mergeable(kind), quantised(kind, plain_bert())
    twin.merge_adapter()
    expected = twin(tokenised()).logits
    merged = model.merge_and_unload()
    assert not any("fps" in name for name, _ in merged.named_modules())
    assert type(merged.bert.pooler.dense) is type(plain.bert.pooler.dense)
    exactly(merged(tokenised()).logits, expected)
    assert layers_of(get_peft_model(merged, config(modules_to_save=[])))
    exactly(twin.unload()(tokenised()).logits, plain(tokenised()).logits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [torch.nan, torch.inf, 3e38], ids=str)
def test_safe_merge_is_all_or_nothing(kind: str, number: float) -> None:
    """8-bit weights are quantised by way of float16, which 3e38 overflows."""
    model = mergeable(kind)
    layers = layers_of(model)
    layers["bert.pooler.dense"].fps_values["a"].data[7] = number
    if number == 3e38 and kind != "8bit":
        for other in layers.values():
            other.fps_values["a"].data.fill_(number)  # the scale or the sum overflows
        layers["bert.pooler.dense"].fps_values["a"].data[7] = torch.inf
    before = all_bytes(model)
    with pytest.raises(ValueError, match="NaNs detected in the merged weights|finite"):
        model.merge_adapter(safe_merge=True)
    assert all_bytes(model) == before
    assert not any(layer.merged for layer in layers.values())


@pytest.mark.parametrize("kind", ["4bit", "torchao"])
def test_changes_that_quantisation_swallows_are_counted(kind: str) -> None:
    model = mergeable(kind)
    fill(model, "a", scale=1e-4)
    with pytest.warns(UserWarning, match=r"Merging lost [\d,]+ of [\d,]+ changes.*quantised \((bnb 4bit|torchao)\)"):
        model.merge_adapter()


def test_weights_that_cannot_be_quantised_again_are_refused_before_anything_is_merged() -> None:
    """torchao quantised them without transformers, so how is not known; the layer before is an ordinary one."""
    base = tiny_mlp(64, 64, 32)
    base.last = quantised_layer("torchao", base.last)
    model = adapted(base)
    x, expected = normal(3, 64), model(normal(3, 64))
    merges: list[Callable[[], Any]] = [model.merge_adapter, model.merge_and_unload]
    merges += [partial(model.merge_adapter, safe_merge=True), layers_of(model)["last"].merge]
    for merge in merges:
        with pytest.raises(ValueError, match="last: its weight was quantised with unknown settings.*Nothing was merg"):
            merge()
        assert not any(layer.merged for layer in layers_of(model).values())
        exactly(model(x), expected)


def test_settings_by_module_name_are_refused_before_anything_is_merged() -> None:
    library("torchao")
    from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig

    model = mergeable("torchao")
    settings = model.base_model.model.hf_quantizer.quantization_config
    settings.get_apply_tensor_subclass = lambda: FqnToConfig({"query": Int8WeightOnlyConfig()})
    with pytest.raises(ValueError, match="query: its weight has a torchao configuration by module name"):
        model.merge_adapter()


# --- a life ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_onto_a_freshly_quantised_base(kind: str, tmp_path: Path) -> None:
    plain = plain_bert()
    model = adapted(quantised(kind, plain), per_neuron=3)
    expected = model(tokenised()).logits
    model.save_pretrained(str(tmp_path))
    with_peft, on_meta = (
        PeftModel.from_pretrained(quantised(kind, plain), str(tmp_path), low_cpu_mem_usage=low)
        for low in (False, True)
    )
    alone = quantised(kind, plain)
    alone.load_adapter(str(tmp_path))  # transformers' own
    for loaded in (with_peft, on_meta, alone):
        exactly(loaded.eval()(tokenised()).logits, expected)
        assert all(layer.fps_values["default"].dtype == torch.float32 for layer in layers_of(loaded).values())
        assert all(layer.quantization_backend is not None for layer in layers_of(loaded).values())


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")  # renamed in transformers
@pytest.mark.parametrize("kind", KINDS)
def test_losses_fall_under_the_trainer(kind: str, tmp_path: Path) -> None:
    base = quantised(kind, plain_bert())
    if kind != "hqq":  # not a model that transformers has quantised
        base = prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": False})
    model = get_peft_model(base, FPSConfig(per_neuron=2))
    examples = [{"input_ids": row, "labels": int(row[0]) % 3} for row in tokenised(16)]
    model.calibrate([{"input_ids": tokenised(16)}], progress=False)
    before = {path: stored_bytes(layer.base_layer) for path, layer in layers_of(model).items()}
    arguments = TrainingArguments(
        str(tmp_path),
        **QUIET | {"per_device_train_batch_size": 8, "logging_strategy": "steps"},
        max_steps=16,
        learning_rate=0.05,
        logging_steps=4,
    )
    trainer = Trainer(model, arguments, train_dataset=examples)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0], losses
    for path, layer in layers_of(model).items():
        assert layer.fps_values["default"].abs().sum() > 0
        assert stored_bytes(layer.base_layer).items() >= before[path].items()


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_an_adapter_of_conv1d_layers_meets_the_linear_layers_they_are_quantised_to(kind: str, tmp_path: Path) -> None:
    """transformers quantises GPT-2's `Conv1D`, whose weights are transposed, to linear layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=64, n_layer=1, n_head=2)).eval()
    source = adapted(copy.deepcopy(plain), per_neuron=2)
    source.save_pretrained(str(tmp_path))
    base = quantised(kind, plain, skip=("lm_head",))
    model = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    theirs = layers_of(source)
    for path, layer in layers_of(model).items():
        assert type(layer) is QuantisedLinear
        exactly(change(layer), change(theirs[path]))
    x = tokenised()
    torch.testing.assert_close(model(x).logits, source(x).logits, rtol=0.5, atol=0.5)
