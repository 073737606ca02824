"""Selections apart from models: taken, given, kept in files and compared, against Python sets."""

import copy
import json
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peft_fps
from peft_fps import FPSConfig, Selection
from peft_fps.saved_selection import ModuleEntries
from tests.support.helpers import (
    PLAIN,
    adapted,
    base_bytes,
    config,
    csr,
    dense_reference,
    fill,
    image_batches,
    images,
    layers_of,
    normal,
    selected_columns,
    selections,
    through_transformers,
    tiny_conv,
    tiny_gpt2,
    tiny_llama,
    tiny_mlp,
    tiny_vit,
    tokens,
    unchanged,
    weighted_of,
)


Rows = list[list[int]]
Entries = dict[str, set[tuple[int, int]]]

MODELS: dict[str, Callable[[], nn.Module]] = {"vit": tiny_vit, "gpt2": tiny_gpt2, "conv": tiny_conv, "mlp": tiny_mlp}
BATCHES: dict[str, Callable[[int], list[Any]]] = {
    "vit": lambda seed: image_batches(2, seed=seed),
    "gpt2": lambda seed: [{"input_ids": tokens(seed=seed)}],
    "conv": lambda seed: [images(seed=seed)],
    "mlp": lambda seed: [normal(4, 10, seed=seed)],
}


def fresh(base: nn.Module, **options: Any) -> PeftModel:
    """A model with an untrained adapter, whose importance needs no data."""
    return adapted(base, filled=False, **options)


def awaiting(base: nn.Module, folder: Path, **options: Any) -> PeftModel:
    """A model with an adapter whose saved tensors are not loaded."""
    fresh(copy.deepcopy(base), **options).save_pretrained(folder)
    return get_peft_model(base, FPSConfig.from_pretrained(str(folder)))


def without_memory() -> nn.Module:
    """A model with an adapter "lean" on the meta device."""
    model = inject_adapter_in_model(config(), tiny_mlp(), "lean", low_cpu_mem_usage=True)
    for layer in layers_of(model).values():
        layer.fps_values["lean"].data = layer.fps_values["lean"].data.to("meta")
    return model


def rows_of(model: nn.Module, name: str = "default") -> dict[str, Rows]:
    return {
        path: selected_columns(layer, name) for path, layer in weighted_of(model).items() if name in layer.fps_values
    }


def as_rows(selection: Selection) -> dict[str, Rows]:
    """Columns of every neuron, entry by entry."""
    result = {}
    for path, module in selection.modules.items():
        columns = iter(module.columns.tolist())
        result[path] = [[next(columns) for _ in range(count)] for count in module.row_counts.tolist()]
        assert next(columns, None) is None
    return result


def as_sets(rows: dict[str, Rows]) -> Entries:
    return {path: {(i, column) for i, row in enumerate(found) for column in row} for path, found in rows.items()}


def of_rows(inputs: int, **modules: Rows) -> Selection:
    return Selection({name: ModuleEntries(*csr(rows), inputs) for name, rows in modules.items()})


def first_entries(sizes: dict[str, tuple[int, int]], count: int) -> Selection:
    """The first `count` entries in order of modules, neurons and columns, given the neurons and inputs of modules."""
    held = {}
    for path, (neurons, inputs) in sizes.items():
        lengths = [max(0, min(inputs, count - i * inputs)) for i in range(neurons)]
        count -= sum(lengths)
        held[path] = ModuleEntries(*csr([list(range(length)) for length in lengths]), inputs)
    assert count == 0
    return Selection(held)


def naive_jaccard(first: set[Any], second: set[Any]) -> float:
    return len(first & second) / len(first | second) if first | second else 1.0


def naive_total(first: Entries, second: Entries, paths: list[str]) -> float:
    united = [{(path, *entry) for path in paths for entry in entries[path]} for entries in (first, second)]
    return naive_jaccard(*united)


@st.composite
def modules(draw: st.DrawFn) -> dict[str, tuple[int, Rows]]:
    """Fan-in and columns per neuron of some modules, empty ones among them."""
    names = draw(st.lists(st.sampled_from(["stem", "a.0.x", "a.0.y", "a.1.x", "b.0.x", "größe"]), unique=True))
    return {name: draw(selections()) for name in names}


# --- taken from an adapter ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["neuron", "layer", "model"])
@pytest.mark.parametrize("name", MODELS)
def test_a_selection_holds_the_columns_of_every_neuron(name: str, granularity: str):
    model = fresh(MODELS[name](), granularity=granularity, per_neuron=1.5)
    found = Selection.of(model)
    assert as_rows(found) == rows_of(model)
    for path, layer in layers_of(model).items():
        weight, transposed = layer.base_layer.weight, name == "gpt2"
        neurons, inputs = weight.shape[::-1] if transposed else (weight.shape[0], weight[0].numel())
        module = found.modules[path]
        assert (module.neurons, module.inputs, tuple(module.row_counts.shape)) == (neurons, inputs, (neurons,))
        assert (module.columns.dtype, module.row_counts.dtype) == (torch.int32, torch.int32)
    assert found.entries == sum(len(row) for rows in rows_of(model).values() for row in rows)


def test_a_selection_is_a_copy_that_training_and_new_selections_do_not_reach():
    model = fresh(tiny_mlp())
    found, before = Selection.of(model), rows_of(model)
    for layer in layers_of(model).values():
        layer.fps_columns["default"].zero_()
        layer.fps_row_counts["default"].zero_()
    assert as_rows(found) == before


@through_transformers
def test_a_selection_of_a_transformers_model_without_a_peft_model():
    model = tiny_vit()
    model.add_adapter(config())
    assert Selection.of(model) == Selection.of(fresh(tiny_vit()))


def test_a_selection_of_one_of_several_adapters():
    model = fresh(tiny_mlp())
    model.add_adapter("other", config(importance="random", target_modules=["last"]))
    assert as_rows(Selection.of(model, "other")) == rows_of(model, "other")
    assert set(Selection.of(model, "other").modules) == {"last"}
    assert as_rows(Selection.of(model)) == rows_of(model)


def test_the_values_do_not_matter():
    model = adapted(tiny_mlp())
    layers_of(model)["first"].fps_values["default"].data.fill_(torch.nan)  # training that diverged
    assert Selection.of(model) == Selection.of(fresh(tiny_mlp()))


def test_the_method_of_a_calibrated_adapter_is_its_record():
    model = fresh(tiny_mlp(), importance="activation", norm="l2", granularity="layer", order="bottom")
    model.calibrate([normal(5, 10)], progress=False)
    method = Selection.of(model).method
    assert (method["importance"], method["order"], method["granularity"]) == ("activation", "bottom", "layer")
    assert (method["calibration"]["norm"], method["calibration"]["examples"]) == ("l2", 5)
    assert set(method["base_fingerprint"]) == {"sha256", "dtype", "sample"}


@pytest.mark.parametrize(
    ("options", "importance"),
    [
        ({"importance": "magnitude", "order": "bottom"}, "magnitude"),
        ({"importance": "random", "seed": 7}, "random"),
        ({"importance": "activation", "granularity": "layer"}, "magnitude"),  # what it starts from until calibrated
        ({"importance": "activation", "budget": 0}, "magnitude"),  # of nothing
        ({"importance": "magnitude", "init_weights": False}, None),  # random places
    ],
    ids=["magnitude", "random", "uncalibrated", "biases", "random places"],
)
def test_the_method_without_data(options: dict[str, Any], importance: str | None):
    method = Selection.of(fresh(tiny_mlp(), **options)).method
    order, granularity = options.get("order", "top"), options.get("granularity", "neuron")
    expected = (None, None, None) if importance is None else (importance, order, granularity)
    assert (method["importance"], method["order"], method["granularity"]) == expected
    assert (method["calibration"] or {}).get("seed") == (None if importance is None else options.get("seed", 0))


def test_an_adapter_on_the_meta_device_is_refused():
    with pytest.raises(ValueError, match="first: the tensors of adapter 'lean' are not loaded"):
        Selection.of(without_memory(), "lean")


def test_a_damaged_adapter_is_refused():
    model = fresh(tiny_mlp())
    layers_of(model)["last"].fps_columns["default"][0] = 12
    with pytest.raises(ValueError, match=r"last: adapter 'default': fps_columns ranges over .* expected \[0, 11\]"):
        Selection.of(model)


def test_an_unknown_adapter_is_refused():
    with pytest.raises(ValueError, match="no FPS adapter named 'other', expected one of .*'default'"):
        Selection.of(fresh(tiny_mlp()), "other")


# --- given to an adapter --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_an_applied_selection_is_the_adapters_from_a_file_too(name: str, tmp_path: Path):
    source = fresh(MODELS[name](), importance="activation", granularity="model", per_neuron=1.3)
    source.calibrate(BATCHES[name](0), progress=False)
    model = fresh(MODELS[name](), per_neuron=3)
    before, selection = base_bytes(model), Selection.of(source)
    report = selection.apply(model)
    assert rows_of(model) == rows_of(source)
    assert {row.module: row.entries for row in report.layers} == {
        path: sum(map(len, rows)) for path, rows in rows_of(source).items()
    }
    assert str(report) == str(model.selection_report())
    assert Selection.of(model) == selection
    assert base_bytes(model) == before
    selection.save(tmp_path / "sub" / "s.safetensors")
    other = fresh(MODELS[name]())
    Selection.load(tmp_path / "sub" / "s.safetensors").apply(other)
    assert rows_of(other) == rows_of(source)


def test_an_applied_selection_trains_from_zero():
    base, model = tiny_mlp(), fresh(tiny_mlp(), per_neuron=3)
    parameters = [p for p in model.parameters() if p.requires_grad]
    Selection.of(fresh(tiny_mlp(), importance="random")).apply(model)
    x = normal(5, 10)
    assert torch.equal(model(x), base(x))
    assert [id(p) for p in model.parameters() if p.requires_grad] == [id(p) for p in parameters]
    fill(model)
    torch.testing.assert_close(model(x), dense_reference(base, model, ["default"])(x))
    model(x).sum().backward()
    for layer in layers_of(model).values():
        assert layer.fps_values["default"].grad is not None
        assert layer.fps_values["default"].grad.shape == layer.fps_columns["default"].shape


def test_an_adapter_counts_as_selected_and_does_not_warn_in_training():
    model = fresh(tiny_mlp(), importance="activation").train()
    Selection.of(fresh(tiny_mlp())).apply(model)
    model(normal(2, 10)).sum().backward()  # a warning would be an error


def test_the_record_goes_along_and_into_the_saved_config(tmp_path: Path):
    source = fresh(tiny_mlp(), importance="activation")
    source.calibrate([normal(6, 10)], progress=False)
    model = fresh(tiny_mlp(), per_neuron=4)
    Selection.of(source).apply(model)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())["record"]
    assert saved["calibration"]["importance"] == "activation"
    assert saved["calibration"]["examples"] == 6
    assert {path: sizes["entries"] for path, sizes in saved["allocation"].items()} == {
        "first": 24,
        "last": 8,
    }
    loaded = PeftModel.from_pretrained(tiny_mlp(), tmp_path)
    assert rows_of(loaded) == rows_of(source)
    assert Selection.of(loaded) == Selection.of(source)


def test_a_selection_reaches_the_named_adapter_alone():
    model = fresh(tiny_mlp())
    model.add_adapter("other", config(importance="random"))
    before, selection = rows_of(model), Selection.of(fresh(tiny_mlp(), importance="random", seed=3))
    selection.apply(model, "other")
    assert rows_of(model) == before
    assert rows_of(model, "other") == as_rows(selection)


def test_an_adapter_that_awaits_loading_has_no_selection_and_takes_one(tmp_path: Path):
    model = awaiting(tiny_mlp(), tmp_path)
    with pytest.raises(ValueError, match="first: the tensors of adapter 'default' are not loaded, expected.*Load an "):
        Selection.of(model)
    selection = Selection.of(fresh(tiny_mlp(), importance="random"))
    selection.apply(model)
    assert rows_of(model) == as_rows(selection)
    assert torch.equal(model(normal(2, 10)), tiny_mlp()(normal(2, 10)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_selection_of_a_half_precision_adapter(dtype: torch.dtype):
    model = get_peft_model(tiny_mlp().to(dtype), config(), autocast_adapter_dtype=False)
    selection = Selection.of(fresh(tiny_mlp(), importance="random", per_neuron=3))
    selection.apply(model)
    assert rows_of(model) == as_rows(selection)
    assert layers_of(model)["first"].fps_values["default"].dtype == dtype


def test_modules_of_an_older_generation_of_transformers_are_found():
    model, found = fresh(tiny_vit()), Selection.of(fresh(tiny_vit(), importance="random"))
    old = {
        path.replace("vit.layers.", "vit.encoder.layer.").replace("q_proj", "attention.query"): module
        for path, module in found.modules.items()
    }
    assert set(old) != set(found.modules)
    Selection(old, found.method).apply(model)
    assert rows_of(model) == as_rows(found)


def test_modules_and_neurons_without_entries_are_applied():
    model = fresh(tiny_mlp())
    none: Rows = [[]] * 12
    Selection({"first": ModuleEntries(*csr(none), 10), "last": ModuleEntries(*csr([[], [3], [], []]), 12)}).apply(
        model
    )
    assert rows_of(model) == {"first": none, "last": [[], [3], [], []]}
    x = normal(3, 10)
    assert torch.equal(model(x), tiny_mlp()(x))
    model(x).sum().backward()


@pytest.mark.parametrize("bias", ["all", "none"])
@pytest.mark.parametrize("budget", [0.3, 0.29, 1.0])
def test_the_budget_is_kept_to_the_entry(budget: float, bias: str):
    sizes, parameters = {"first": (12, 10), "last": (4, 12)}, 12 * 10 + 12 + 4 * 12 + 4
    biases = 16 if bias == "all" else 0
    limit = min(int(Fraction(str(budget)) * parameters), biases + 168) - biases
    model = fresh(tiny_mlp(), budget=budget, bias=bias)
    report = first_entries(sizes, limit).apply(model)
    assert report.trained == limit + biases
    if limit < 168:
        state = copy.deepcopy(layers_of(model)["first"].fps_state["default"])
        with unchanged(model), pytest.raises(ValueError) as error:  # noqa: PT011 - the message is looked at below
            first_entries(sizes, limit + 1).apply(model)
        says = f"adapter 'default': the selection has {limit + 1} entries, which with {biases} bias deltas train "
        assert says in str(error.value)
        assert f"expected at most {limit + biases} by budget={budget} of 184. Add" in str(error.value)
        assert layers_of(model)["first"].fps_state["default"] == state


def test_the_budget_is_the_decimal_number_that_was_written():
    model = fresh(tiny_mlp(9, 9, 1), budget=0.29, bias="none")  # of 100 parameters; 0.29 * 100 < 29 in binary
    rows: Rows = [list(range(9))] * 3 + [[0, 1]] + [[]] * 5
    selection = Selection({"first": ModuleEntries(*csr(rows), 9), "last": ModuleEntries(*csr([[]]), 9)})
    assert selection.apply(model).entries == 29


def test_bitfit_takes_no_entry():
    model = fresh(tiny_mlp(), budget=0)
    with unchanged(model), pytest.raises(ValueError, match="has 32 entries.* expected at most 16 by budget=0 of 184"):
        Selection.of(fresh(tiny_mlp())).apply(model)
    assert Selection.of(fresh(tiny_mlp(), budget=0)).apply(model).entries == 0


Modules = dict[str, ModuleEntries]
MISMATCHES: dict[str, tuple[Callable[[Modules], Modules], str]] = {
    "missing": (
        lambda modules: {"first": modules["first"]},
        "last: not in {given}, expected all 2 modules of {whose}.",
    ),
    "unknown": (
        lambda modules: modules | {"middle": modules["last"]},
        "middle: in {given}, expected the 2 modules of {whose} alone.",
    ),
    "neurons": (
        lambda modules: modules | {"last": ModuleEntries(*csr([[0]] * 3), 12)},
        "last: found 3 neurons with 12 inputs in {given}, expected 4 with 12 as in {whose}.",
    ),
    "fan-in": (
        lambda modules: modules | {"last": ModuleEntries(*csr([[0]] * 4), 11)},
        "last: found 4 neurons with 11 inputs in {given}, expected 4 with 12 as in {whose}.",
    ),
}
"""How a selection's modules change, and what is said of it."""


@pytest.mark.parametrize("name", MISMATCHES)
def test_a_selection_of_other_modules_is_refused_and_nothing_changes(name: str):
    change, says = MISMATCHES[name]
    model = fresh(tiny_mlp())
    selection = Selection(change(Selection.of(fresh(tiny_mlp(), importance="random")).modules))
    with unchanged(model), pytest.raises(ValueError) as error:  # noqa: PT011 - the message is looked at below
        selection.apply(model)
    assert says.format(given="the selection", whose="adapter 'default'") in str(error.value)
    assert str(error.value).endswith("Nothing was changed.")


def test_trained_changes_are_kept_unless_given_up():
    model = adapted(tiny_mlp())
    selection = Selection.of(fresh(tiny_mlp(), importance="random"))
    with unchanged(model), pytest.raises(ValueError, match="first: adapter 'default' holds trained changes, expected"):
        selection.apply(model)
    selection.apply(model, discard_values=True)
    assert rows_of(model) == as_rows(selection)
    assert torch.equal(model(normal(2, 10)), tiny_mlp()(normal(2, 10)))


def test_a_merged_adapter_is_refused():
    model = adapted(tiny_mlp())
    model.merge_adapter()
    with unchanged(model), pytest.raises(ValueError, match=r"first: found merged adapters.*unmerge_adapter\(\)"):
        Selection.of(fresh(tiny_mlp())).apply(model, discard_values=True)


def test_a_method_that_was_spoilt_later_is_refused_before_anything_changes():
    model, selection = fresh(tiny_mlp()), Selection.of(fresh(tiny_mlp(), importance="random"))
    selection.method["calibration"] = "unknown"
    with unchanged(model), pytest.raises(ValueError, match="calibration='unknown', expected None or a dict"):
        selection.apply(model)


def test_taking_and_giving_in_inference_mode():
    source, model = fresh(tiny_mlp(), importance="random"), fresh(tiny_mlp())
    with torch.inference_mode():
        Selection.of(source).apply(model)
    assert rows_of(model) == rows_of(source)
    model.train()(normal(2, 10)).sum().backward()


def test_an_adapter_to_be_loaded_without_memory_is_refused():
    with pytest.raises(ValueError, match="first: adapter 'lean' is on the meta device"):
        Selection.of(fresh(tiny_mlp())).apply(without_memory(), "lean")


# --- norms, which train a bias alone --------------------------------------------------------------------------------


NORMS = {f"vit.layers.{i}.layernorm_{place}" for i in (0, 1) for place in ("before", "after")} | {"vit.layernorm"}


def bias_deltas(model: nn.Module) -> dict[str, Tensor]:
    layers = layers_of(model)
    return {path: layer.fps_bias["default"].detach() for path, layer in layers.items() if "default" in layer.fps_bias}


@pytest.mark.parametrize("budget", [0.1, 0])
def test_norms_are_left_out_of_models_and_of_saved_adapters(budget: float, tmp_path: Path):
    model = adapted(tiny_vit(), bias="with_norms", budget=budget)
    found = Selection.of(model)
    assert set(layers_of(model)) - set(found.modules) == NORMS
    assert as_rows(found) == rows_of(model)
    model.save_pretrained(tmp_path)
    assert Selection.from_adapter(tmp_path) == found


def test_a_selection_of_norms_alone_is_empty():
    base = nn.Sequential(nn.LayerNorm(4), nn.Conv1d(4, 4, 1))
    model = fresh(base, bias="with_norms", budget=0, target_modules=["0"])
    assert set(layers_of(model)) == {"0"}
    found = Selection.of(model)
    assert (found.modules, found.entries) == ({}, 0)
    fill(model)
    found.apply(model, discard_values=True)
    assert bias_deltas(model)["0"].tolist() == [0.0] * 4


@pytest.mark.parametrize(("source", "target"), [("with_norms", "none"), ("none", "with_norms"), ("with_norms",) * 2])
def test_a_selection_fits_adapters_with_and_without_norms(source: str, target: str):
    model = fresh(tiny_vit(), bias=target, per_neuron=3)
    selection = Selection.of(fresh(tiny_vit(), bias=source, importance="random"))
    report = selection.apply(model)
    found = rows_of(model)
    assert {path: found[path] for path in selection.modules} == as_rows(selection)
    assert Selection.of(model).modules == selection.modules
    assert report.biases == sum(p.numel() for n, p in model.named_parameters() if "fps_bias" in n)
    assert (set(layers_of(model)) >= NORMS) == (target == "with_norms")


def test_bias_deltas_of_all_modules_are_fresh_after_applying():
    model = adapted(tiny_vit(), bias="with_norms", modules_to_save=[])
    parameters = {path: layer.fps_bias.get("default") for path, layer in layers_of(model).items()}
    model(images()).logits.sum().backward()
    assert all(delta.all() for delta in bias_deltas(model).values())
    selection = Selection.of(fresh(tiny_vit(), importance="random"))
    with unchanged(model), pytest.raises(ValueError, match="holds trained changes"):
        selection.apply(model)
    selection.apply(model, discard_values=True)
    assert set(bias_deltas(model)) > NORMS
    assert not any(delta.any() for delta in bias_deltas(model).values())
    for path, layer in layers_of(model).items():
        assert layer.fps_bias.get("default") is parameters[path]
        assert getattr(parameters[path], "grad", None) is None
    assert torch.equal(model(images()).logits, tiny_vit()(images()).logits)
    model.train()(images()).logits.sum().backward()
    assert all(parameters[path].grad is not None for path in NORMS)


def test_a_norm_s_trained_bias_alone_is_kept_unless_given_up():
    model = fresh(tiny_vit(), bias="with_norms")
    layers_of(model)["vit.layernorm"].fps_bias["default"].data[3] = 0.5
    selection = Selection.of(fresh(tiny_vit(), importance="random"))
    with unchanged(model), pytest.raises(ValueError, match=r"vit\.layernorm: adapter 'default' holds trained changes"):
        selection.apply(model)


def test_a_selection_for_an_adapter_with_norms_that_awaits_loading(tmp_path: Path):
    model = awaiting(tiny_vit(), tmp_path, bias="with_norms")
    with pytest.raises(ValueError, match="the tensors of adapter 'default' are not loaded"):
        Selection.of(model)
    Selection.of(fresh(tiny_vit(), importance="random")).apply(model)
    assert torch.equal(model(images()).logits, tiny_vit()(images()).logits)


def test_biases_of_norms_count_in_the_budget():
    model, base = fresh(tiny_vit(), bias="with_norms", budget=0.2), tiny_vit()
    parameters = sum(p.numel() for name, p in base.named_parameters() if not name.startswith("classifier."))
    biases = sum(delta.numel() for delta in bias_deltas(model).values())
    assert biases > 5 * 32 == sum(bias_deltas(model)[path].numel() for path in NORMS)
    full = Selection.of(fresh(base, per_neuron=1000)).modules
    selection = first_entries({p: (m.neurons, m.inputs) for p, m in full.items()}, parameters // 5 - biases)
    assert selection.apply(model).trained == parameters // 5
    found = dict(selection.modules)
    path, last = list(found.items())[-1]
    assert last.entries == 0
    found[path] = ModuleEntries(*csr([[0]] + [[]] * (last.neurons - 1)), last.inputs)
    with (
        unchanged(model),
        pytest.raises(ValueError, match=f"train {parameters // 5 + 1:,} parameters, expected at mo"),
    ):
        Selection(found).apply(model)


# --- built by hand --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "error", "says"),
    [
        ([], TypeError, "method is \\[\\] of type list, expected a dict of plain data"),
        ({"calibration": {"norm": {1, 2}}}, ValueError, "cannot be written as JSON.*expected a dict of plain data"),
        ({"score": float("nan")}, ValueError, "cannot be written as JSON"),
        ({"calibration": "yes"}, ValueError, "calibration='yes', expected None or a dict"),
        ({"calibration": {"examples": "12"}}, ValueError, "calibration.*examples is '12', expected an integer"),
        ({"calibration": {"examples": True}}, ValueError, "calibration.*examples is True, expected an integer"),
        (
            {"base_fingerprint": {"sha256": 1, "dtype": "float32"}},
            ValueError,
            "base_fingerprint.*expected None or",
        ),
        ({"base_fingerprint": "abc"}, ValueError, "base_fingerprint.* is 'abc' of type str, expected None or"),
    ],
)
def test_methods_that_could_not_be_kept_are_refused(method: Any, error: type[Exception], says: str):
    with pytest.raises(error, match=says):
        Selection({}, method)


def test_a_method_is_copied():
    method = {"calibration": {"examples": 3}, "pair": (1, 2)}
    selection = Selection({}, method)
    method["calibration"] = None
    assert selection.method == {"calibration": {"examples": 3}, "pair": [1, 2]}


def test_selections_are_equal_by_entries_fan_in_and_method():
    first = of_rows(4, a=[[0, 1], []], b=[[2]])
    assert first == of_rows(4, b=[[2]], a=[[0, 1], []])
    others = [
        of_rows(4, a=[[0, 2], []], b=[[2]]),
        of_rows(4, a=[[0], [1]], b=[[2]]),
        of_rows(4, a=[[0, 1]], b=[[2]]),
        of_rows(5, a=[[0, 1], []], b=[[2]]),
        of_rows(4, a=[[0, 1], []], c=[[2]]),
        of_rows(4, a=[[0, 1], []]),
        Selection(first.modules, {"importance": "magnitude"}),
        "a selection",
    ]
    assert all(first != other for other in others)
    assert repr(first) == "Selection(3 entries in 2 modules, method={})"


# --- files ----------------------------------------------------------------------------------------------------------


@given(modules(), st.dictionaries(st.sampled_from(["importance", "note", "größe"]), PLAIN))
def test_loading_a_saved_selection_gives_it_back(
    tmp_path_factory: pytest.TempPathFactory, given_modules: dict[str, tuple[int, Rows]], method: dict[str, Any]
):
    path = tmp_path_factory.mktemp("selection") / "one.safetensors"
    selection = Selection(
        {n: ModuleEntries(*csr(rows), inputs) for n, (inputs, rows) in given_modules.items()}, method
    )
    selection.save(path)
    loaded = Selection.load(path)
    assert loaded == selection
    assert list(loaded.modules) == list(given_modules)
    assert as_rows(loaded) == {name: rows for name, (_, rows) in given_modules.items()}
    assert loaded.method == method


def test_equal_selections_give_equal_bytes(tmp_path: Path):
    for name in ("one", "two"):
        Selection.of(fresh(tiny_vit())).save(str(tmp_path / name))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('"method": {"calibration": "x"}', "method has calibration='x', expected None or a dict"),
        ('"method": {"score": NaN}', "method cannot be written as JSON"),
        ('"method": 1', "expected the objects 'allocation' and 'method'"),
    ],
)
def test_a_file_with_another_record_is_refused(text: str, says: str, tmp_path: Path):
    path = tmp_path / "s"
    save_file({}, path, {"peft_fps_selection": f'{{"format_version": 1, "allocation": {{}}, {text}}}'})
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: .*{says}.*fetch or save it again"):
        Selection.load(path)


# --- out of an adapter folder ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["neuron", "model"])
@pytest.mark.parametrize("name", MODELS)
def test_a_saved_adapter_gives_the_selection_of_the_model(name: str, granularity: str, tmp_path: Path):
    model = fresh(MODELS[name](), importance="activation", granularity=granularity, per_neuron=1.5)
    model.calibrate(BATCHES[name](0), progress=False)
    fill(model)
    model.save_pretrained(tmp_path)
    assert Selection.from_adapter(tmp_path) == Selection.of(model)
    assert Selection.from_adapter(str(tmp_path)).entries == model.selection_report().entries


def test_an_adapter_saved_uncalibrated_does_not_tell_its_importance(tmp_path: Path):
    model = fresh(tiny_mlp(), importance="activation")
    model.save_pretrained(tmp_path)
    found = Selection.from_adapter(tmp_path)
    assert as_rows(found) == rows_of(model)
    assert {found.method[key] for key in ("importance", "order", "granularity", "calibration")} == {None}
    assert found.method["base_fingerprint"] == Selection.of(model).method["base_fingerprint"]


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"lacks adapter_config.json, adapter_model.safetensors, expected the folder"):
        Selection.from_adapter(tmp_path)


def test_an_adapter_of_another_method_is_refused(tmp_path: Path):
    get_peft_model(tiny_mlp(), LoraConfig(target_modules=["first"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a LoraConfig without saved entries, expected an FPSConfig"):
        Selection.from_adapter(tmp_path)


def test_a_damaged_adapter_file_is_refused(tmp_path: Path):
    adapted(tiny_mlp()).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.last.fps_columns"] = torch.full((8,), 12, dtype=torch.uint16)
    file.unlink()
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"last: fps_columns ranges over \[12, 12\], expected \[0, 11\]"):
        Selection.from_adapter(tmp_path)


# --- overlap --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vits() -> dict[str, PeftModel]:
    """The same model with selections by different methods and on different data."""
    result = {}
    for name, importance in (("activation", "activation"), ("other data", "activation"), ("random", "random")):
        result[name] = fresh(tiny_vit(), importance=importance, per_neuron=4)
        if importance == "activation":
            result[name].calibrate(image_batches(2, seed=9 * (name == "other data")), progress=False)
    result["magnitude"] = fresh(tiny_vit(), per_neuron=6, granularity="model")
    return result


@pytest.mark.parametrize("second", ["magnitude", "random", "other data"])
def test_methods_on_a_vit_overlap_as_their_sets_do(vits: dict[str, PeftModel], second: str):
    models = vits["activation"], vits[second]
    sets = [as_sets(rows_of(model)) for model in models]
    found = Selection.of(models[0]).overlap(Selection.of(models[1]))
    assert found.modules == {path: naive_jaccard(sets[0][path], sets[1][path]) for path in sets[0]}
    assert found.total == naive_total(sets[0], sets[1], list(sets[0]))
    assert 0 < found.total < 1
    layers = [[path for path in sets[0] if f".layers.{i}." in path] for i in (0, 1)]
    assert [len(paths) for paths in layers] == [6, 6]
    assert found.blocks == {f"vit.layers.{i}": naive_total(sets[0], sets[1], layers[i]) for i in (0, 1)}


@pytest.mark.parametrize(
    ("build", "blocks"),
    [(tiny_gpt2, {"transformer.h.0", "transformer.h.1"}), (tiny_llama, {"model.layers.0", "model.layers.1"})],
)
def test_blocks_of_language_models(build: Callable[[], nn.Module], blocks: set[str]):
    selection = Selection.of(fresh(build()))
    assert set(selection.overlap(selection).blocks) == blocks


@pytest.mark.parametrize("name", MISMATCHES)
def test_selections_of_different_modules_are_not_compared(name: str):
    change, says = MISMATCHES[name]
    selection = Selection.of(fresh(tiny_mlp()))
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is looked at below
        selection.overlap(Selection(change(selection.modules)))
    assert says.format(given="the other selection", whose="this selection") in str(error.value)


def test_the_name_is_public():
    assert peft_fps.Selection is Selection
    assert "Selection" in peft_fps.__all__
