"""What a user may ask for: every wrong value is refused, and the file keeps what was asked."""

import copy
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file, save_file

from peft_fps import FPSConfig
from peft_fps.checkpoint.record import AdapterRecord
from tests.support.helpers import adapted, layers_of, tiny_llama, tiny_vit, with_fields


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SIZES = {"neurons": 2, "inputs": 3, "entries": 4}

FULL: dict[str, Any] = {
    "budget": None,
    "per_neuron": 2.5,
    "importance": "random",
    "norm": "l2",
    "weight_magnitude": False,
    "granularity": "model",
    "bias": "none",
    "target_modules": ["value", "query"],
    "exclude_modules": ["key"],
    "layers_to_transform": [0, 2],
    "layers_pattern": ["layers", "blocks"],
    "modules_to_save": ["head", "classifier"],
    "target_parameters": ["experts.down_proj"],
    "budget_pattern": {"query": 1, "value": 2.5},
    "init_weights": False,
    "seed": 7,
    "record": {
        "allocation": {"layers.0.query": SIZES},
        "calibration": {"batches": 3, "examples": 12},
        "base_fingerprint": {"sha256": "0" * 64, "dtype": "float32"},
        "whole_tensors": ["classifier.weight", "head.weight"],
        "tensors_sha256": "1" * 64,
        "pickled": False,
    },
    "task_type": "FEATURE_EXTRACTION",
    "base_model_name_or_path": "some/model",
    "revision": "main",
    "inference_mode": True,
}


NAN, INFINITE = float("nan"), float("inf")


# --- defaults -------------------------------------------------------------------------------------------------------


def test_the_default_is_the_papers_budget():
    assert FPSConfig() == FPSConfig(budget=0.0077)
    found = FPSConfig()
    assert (found.budget, found.per_neuron, found.importance, found.norm) == (0.0077, None, "activation", "l1")
    assert (found.granularity, found.bias, found.weight_magnitude, found.init_weights) == ("neuron", "all", True, True)
    assert found.target_modules is None
    assert found.peft_type == "FPS"
    assert FPSConfig(per_neuron=3).budget is None


@pytest.mark.parametrize("peft_type", [None, "LORA", "FPS"])
def test_the_type_is_always_fps(peft_type: str | None):
    assert FPSConfig(peft_type=peft_type).peft_type.value == "FPS"


def test_construction_does_not_warn(recwarn: pytest.WarningsRecorder):
    FPSConfig()
    FPSConfig(**FULL)
    assert not recwarn.list


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        ({}, True),
        ({"per_neuron": 1}, True),
        ({"importance": "magnitude"}, False),
        ({"importance": "random"}, False),
        ({"importance": "gradient"}, True),
        ({"importance": "l0"}, True),
        ({"budget": 0}, False),
        ({"per_neuron": 0}, False),
    ],
    ids=str,
)
def test_needs_calibration(options: dict[str, Any], needed: bool):
    assert FPSConfig(**options).needs_calibration is needed


@pytest.mark.parametrize("name", ["target_modules", "exclude_modules"])
@pytest.mark.parametrize("kind", [list, tuple, set])
def test_lists_of_modules_become_sets(name: str, kind: type):
    assert getattr(FPSConfig(**{name: kind(["b", "a"])}), name) == {"a", "b"}
    assert getattr(FPSConfig(**{name: r"a.*\.b"}), name) == r"a.*\.b"
    assert getattr(FPSConfig(**{name: kind([])}), name) == set()


@pytest.mark.parametrize(
    ("given", "kept"), [(0, 0), (3, 3), ([0], [0]), ([2, 1], [2, 1]), ((0, 1), [0, 1]), ({1}, [1])]
)
def test_blocks_to_transform(given: Any, kept: Any):
    assert FPSConfig(target_modules=["query"], layers_to_transform=given).layers_to_transform == kept
    assert FPSConfig(target_modules="all-linear", layers_to_transform=given, layers_pattern="h").layers_pattern == "h"


EMPTY = {
    "exclude_modules": ["", [], (), set(), None],
    "layers_to_transform": [[], None],
    "layers_pattern": ["", [], (), set(), None],
    "modules_to_save": ["", [], ()],
    "inference_mode": [None, 0, "", False],
    "revision": ["", None],
    "auto_mapping": [{}, None],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in EMPTY.items() for value in values])
def test_empty_values_mean_what_they_mean_to_peft(name: str, value: Any, tmp_path: Path):
    lora = get_peft_model(tiny_llama(), LoraConfig(target_modules=["up_proj"], **{name: value}))
    expected = {path for path, module in lora.named_modules() if isinstance(module, BaseTunerLayer)}
    wrapped = {path for path, module in lora.named_modules() if isinstance(module, ModulesToSaveWrapper)}
    frozen = [parameter for parameter in lora.parameters() if parameter.requires_grad] == []
    model = get_peft_model(
        tiny_llama(), FPSConfig(target_modules=["up_proj"], importance="magnitude", **{name: value})
    )
    assert {path for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)} == expected
    assert {path for path, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)} == wrapped
    assert ([parameter for parameter in model.parameters() if parameter.requires_grad] == []) == frozen
    model.save_pretrained(tmp_path)
    assert PeftModel.from_pretrained(tiny_llama(), tmp_path).peft_config["default"].layers_pattern is None


@pytest.mark.parametrize("blocks", [[], (), set()])
@pytest.mark.parametrize("targets", [None, "all-linear", ["up_proj"]])
def test_no_blocks_to_transform_means_all(blocks: Any, targets: Any):
    given, without = (
        get_peft_model(tiny_llama(), FPSConfig(target_modules=targets, importance="magnitude", **options))
        for options in ({"layers_to_transform": blocks}, {})
    )
    assert set(layers_of(given)) == set(layers_of(without))
    assert len({path.split(".")[2] for path in layers_of(given)}) == len(given.base_model.model.model.layers) > 1


@pytest.mark.parametrize("budget", [0, 0.0, 1, 1.0, 1e-9])
def test_budgets_at_the_edge(budget: float):
    assert FPSConfig(budget=budget).budget == budget
    assert FPSConfig(per_neuron=1000 * budget).per_neuron == 1000 * budget


# --- wrong values ---------------------------------------------------------------------------------------------------


WRONG_BY_RULE: list[tuple[str, str, list[Any]]] = [
    # field, part of what is allowed, wrong values
    ("budget", "between 0 and 1", [-0.1, 1.5, NAN, INFINITE]),
    ("budget", "number between 0 and 1", ["0.1", True, [0.1]]),
    ("per_neuron", "a finite number of at least 0", [-1, NAN, INFINITE]),
    ("per_neuron", "number of at least 0", ["2", False]),
    ("importance", "'activation', 'magnitude', 'random'", ["gradients", None, ["activation"]]),
    ("norm", "'l1', 'l2'", ["l3", 2]),
    ("weight_magnitude", "True or False", [1, None]),
    ("granularity", "'neuron', 'layer', 'model', 'block', 'row', 'column'", ["blocks", True]),
    ("bias", "'none', 'all'", [True, "lora_only"]),
    ("target_modules", "not empty", ["", ["query", ""]]),
    ("target_modules", "a name or a list of names", [3, ["query", 3], {"query": 1}]),
    ("target_modules", "regular expression", ["("]),
    ("exclude_modules", "a name or a list of names", [b"query", [None]]),
    ("exclude_modules", "regular expression", ["["]),
    ("layers_to_transform", "0 or more", [-1, [0, -1]]),
    ("layers_to_transform", "list of indices", [True, 1.0, "0"]),
    ("layers_pattern", "layers_to_transform", ["layers"]),
    ("layers_pattern", "a name or a list of names", [3]),
    ("target_parameters", "a list of names", ["experts.down_proj"]),
    ("target_parameters", "not empty", [[""]]),
    ("modules_to_save", "a list of names", ["classifier", 1]),
    ("modules_to_save", "not empty", [[""]]),
    ("budget_pattern", "dict", [["query"], None]),
    ("budget_pattern", "module name", [{3: 0.1}]),
    ("budget_pattern", "regular expression", [{"(": 0.1}]),
    ("budget_pattern", "between 0 and 1", [{"query": 1.5}, {"query": -1}]),
    ("budget_pattern", "number", [{"query": None}, {"query": "1"}]),
    ("init_weights", "True or False", ["gaussian", None]),
    ("seed", "at least 0 and below 2**63", [-1, 2**63]),
    ("seed", "integer", [1.0, True, None]),
    ("format_version", "at most 2", [3]),
    ("format_version", "at least 1", [0]),
    ("format_version", "integer", ["1", True, None]),
    ("token_keep_rate", "above 0 and at most 1", [0]),
    ("token_keep_rate", "between 0 and 1", [1.5]),
    ("token_keep_rate", "a number between 0 and 1", [True, "0.7"]),
    ("token_blocks", "token_keep_rate is None", [[3]]),
    ("token_blocks", "a list of indices, at least one", [[], 3]),
    ("token_blocks", "a list of indices", [[True]]),
    ("token_blocks", "distinct indices of 0 or more", [[-1], [3, 3]]),
    ("token_gate", "one of 'threshold'", ["sigmoid", True]),
    ("token_gate_penalty", "at least 0", [-1.0]),
    ("token_gate_penalty", "a number of at least 0", [None]),
    ("saved_inputs", "'rebuild', 'columns', 'bfloat16'", ["all", None]),
    ("check_base", "'error', 'warn'", ["ignore", None]),
    ("plugin", "a package name", [3, None]),
    ("inference_mode", "True or False", ["no"]),
    ("task_type", "SEQ_CLS", ["GUESSING"]),
    ("order", "'top', 'bottom'", ["first"]),
    ("fisher", "'example', 'batch'", ["sample"]),
    ("loss", "'task', 'contrastive'", ["cross_entropy"]),
    ("selection_learning_rate", "a finite number of at least 0", [-1e-3]),
    ("selection_learning_rate", "a number of at least 0", ["1e-3"]),
    ("selection_epochs", "an integer of at least 1", [0, 1.5]),
    ("l0_penalty", "a number of at least 0", [None]),
    ("l0_penalty", "a finite number of at least 0", [NAN]),
    ("block_top", "a finite number between 0 and 1", [1.5]),
    ("block_top", "a number between 0 and 1", [None]),
    ("recipe", "None or a dict of training arguments", ["adam"]),
    ("record", "expected None or", [[SIZES]]),
    ("record", "expected the sizes of every module", [{}, {"calibration": {}}, {"allocation": None}]),
    ("record", "expected allocation, calibration, base_fingerprint, ", [{"allocation": {}, "origin": 1}]),
]
WRONG = [(name, value, allowed) for name, allowed, values in WRONG_BY_RULE for value in values]


def refusal(options: dict[str, Any]) -> str:
    with pytest.raises((TypeError, ValueError)) as caught:
        FPSConfig(**options)
    return str(caught.value)


@pytest.mark.parametrize(("name", "value", "allowed"), WRONG, ids=[f"{name}-{value!r}" for name, value, _ in WRONG])
def test_a_wrong_value_is_refused_with_field_found_and_allowed(name: str, value: Any, allowed: str):
    message = refusal({name: value})
    found = next(iter(value.values())) if name == "budget_pattern" and isinstance(value, dict) else value
    if name == "record" and isinstance(value, dict):
        found = "origin" if "origin" in value else "allocation is None"
    assert name.replace("task_type", "task type") in message
    assert repr(found) in message or str(found) in message or repr(next(iter(value))) in message
    assert allowed in message


RECORD: dict[str, Any] = {"allocation": {"query": SIZES}}
WRONG_SIZES = [
    # sizes, what is allowed
    ({"neurons": 2, "inputs": 3}, "the integers 'neurons', 'inputs' and 'entries'"),
    ([2, 3, 4], "the integers 'neurons', 'inputs' and 'entries'"),
    (SIZES | {"more": 1}, "the integers 'neurons', 'inputs' and 'entries'"),
    (SIZES | {"entries": -1}, "integers of at least 0"),
    (SIZES | {"entries": 1.0}, "integers of at least 0"),
    (SIZES | {"neurons": True}, "integers of at least 0"),
    (SIZES | {"entries": 7}, "at most neurons times inputs entries"),
]
WRONG_RECORDS = [
    # field, wrong value, what the message says
    (
        "allocation",
        [SIZES],
        f"allocation is {[SIZES]} of type list, expected what an adapter_config.json holds, a dict of sizes by module",
    ),
    ("allocation", {3: SIZES}, f"allocation[3] is {SIZES}, expected the integers 'neurons', 'inputs' and 'entries'"),
    *(("allocation", {"query": sizes}, f"allocation['query'] is {sizes}, expected {a}") for sizes, a in WRONG_SIZES),
    ("calibration", ["batches"], "calibration is ['batches'] of type list, expected a dict or none"),
    ("calibration", {"examples": True}, "calibration: examples is True, expected an integer"),
    ("calibration", {"examples": "12"}, "calibration: examples is '12', expected an integer"),
    ("calibration", {"importance": ["by", "hand"]}, "calibration: importance is ['by', 'hand'], expected a string"),
    ("calibration", {"weight_magnitude": 1}, "calibration: weight_magnitude is 1, expected True, False"),
    ("calibration", {"l0_penalty": "1"}, "calibration: l0_penalty is '1', expected a number"),
    ("calibration", {"unreached": "pooler"}, "calibration: unreached is 'pooler', expected a list of names"),
    ("calibration", {"unreached": [3]}, "calibration: unreached is [3], expected a list of names"),
    ("calibration", {"weights": [True]}, "calibration: weights is [True], expected a list of numbers"),
    ("base_fingerprint", "0" * 64, f"base_fingerprint is {'0' * 64!r} of type str, expected None or"),
    (
        "base_fingerprint",
        {"sha256": 5, "dtype": "float32"},
        "base_fingerprint is {'sha256': 5, 'dtype': 'float32'} of type dict, expected None or",
    ),
    ("whole_tensors", "classifier.weight", "whole_tensors is 'classifier.weight', expected None, a list of names"),
    ("whole_tensors", [3], "whole_tensors is (3,), expected None, a list of names"),
    ("tensors_sha256", 5, "tensors_sha256 is 5 of type int, expected None or a string"),
    ("pickled", "yes", "pickled is 'yes' of type str, expected True or False"),
]


@pytest.mark.parametrize("form", ["record", "flat", "flat and alone"])
@pytest.mark.parametrize(("name", "value", "says"), WRONG_RECORDS, ids=[f"{n}-{v!r}" for n, v, _ in WRONG_RECORDS])
def test_a_wrong_record_is_refused_in_the_form_of_either_version(form: str, name: str, value: Any, says: str):
    record = RECORD | {name: value}
    message = refusal({"record": {"record": record}, "flat": record, "flat and alone": {name: value}}[form])
    assert says in message
    assert message.endswith("The config is damaged; fetch or save the adapter again.")


def test_what_a_calibration_says_beyond_the_known_fields_is_left_out():
    record = RECORD | {"calibration": {"importance": "by hand", "note": [1], "norm": None}}
    found = FPSConfig(record=record).record
    assert found is not None
    assert found.to_json()["calibration"] == {"importance": "by hand"}


def test_every_field_has_a_wrong_value():
    informative = {"peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision"}  # PEFT's own
    wrong, recorded = ({name for name, _, _ in table} for table in (WRONG, WRONG_RECORDS))
    of_version_1 = {field.name for field in fields(AdapterRecord)} - {"selecting_blocks"}
    assert wrong | recorded == {field.name for field in fields(FPSConfig)} - informative | of_version_1
    assert recorded == of_version_1


def test_wrong_blocks_in_a_record_are_refused():
    message = refusal({"record": RECORD | {"selecting_blocks": [3, "4"]}})
    assert "selecting_blocks is (3, '4'), expected None or a list of indices" in message
    assert FPSConfig(record=RECORD | {"selecting_blocks": [3]}).record.selecting_blocks == (3,)
    assert "selecting_blocks" not in FPSConfig(record=RECORD).record.to_json()


def test_bitfit_has_no_scores_to_choose_blocks_by():
    assert "expected the blocks by name" in refusal({"budget": 0, "token_keep_rate": 0.5})
    assert FPSConfig(budget=0, token_keep_rate=0.5, token_blocks=[4, 2]).token_blocks == [2, 4]


@pytest.mark.parametrize("importance", ["activation", "magnitude", "random", "movement", "l0"])
def test_the_contrastive_loss_serves_backward_passes_alone(importance: str):
    message = refusal({"importance": importance, "loss": "contrastive"})
    assert repr(importance) in message
    assert "'gradient', 'fisher', 'sensitivity'" in message
    FPSConfig(importance="gradient", loss="contrastive")


def test_budget_and_k_exclude_each_other():
    message = refusal({"budget": 0.01, "per_neuron": 2})
    assert "budget=0.01" in message
    assert "per_neuron=2" in message
    assert "at most one" in message


@pytest.mark.parametrize(
    "options", [{"layers_to_transform": 0}, {"layers_to_transform": [1], "layers_pattern": "h"}], ids=str
)
def test_blocks_with_a_regular_expression_are_refused(options: dict[str, Any]):
    message = refusal({"target_modules": r".*query", **options})
    assert "layers_to_transform is" in message
    assert "'.*query'" in message
    assert "list of names" in message


def test_a_pattern_is_a_number_of_entries_with_k():
    assert FPSConfig(per_neuron=1, budget_pattern={"query": 12}).budget_pattern == {"query": 12}
    assert "at least 0" in refusal({"per_neuron": 1, "budget_pattern": {"query": -1}})


def test_a_saved_config_lists_the_tensors_saved_whole():
    message = refusal(with_fields(FULL, whole_tensors=None))
    assert "whole_tensors is None" in message
    assert "['head', 'classifier']" in message


def test_a_newer_format_says_how_to_upgrade():
    assert "pip install -U peft-fps" in refusal({"format_version": 3})


# --- copies and files -----------------------------------------------------------------------------------------------


def rewrite(folder: Path, **changes: Any) -> None:
    data = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(data | changes))


@pytest.mark.parametrize("options", [{}, {"budget": 0.25}, FULL], ids=["default", "budget", "full"])
@pytest.mark.parametrize("loader", [FPSConfig, PeftConfig], ids=["FPSConfig", "PeftConfig"])
def test_round_trips(options: dict[str, Any], loader: type[PeftConfig], tmp_path: Path):
    config = FPSConfig(**options)
    config.save_pretrained(tmp_path)
    assert loader.from_pretrained(str(tmp_path)) == config
    assert FPSConfig(**json.loads(json.dumps(config.to_dict()))) == config
    assert copy.deepcopy(config) == config
    assert (tmp_path / CONFIG).read_text() == json.dumps(config.to_dict(), indent=2, sort_keys=True)


def test_the_file_says_what_was_asked(tmp_path: Path):
    FPSConfig(**FULL).save_pretrained(tmp_path)
    data = json.loads((tmp_path / CONFIG).read_text())
    assert {name: data[name] for name in FULL} == FULL | {"target_modules": ["query", "value"]}
    assert (data["peft_type"], data["format_version"], data["plugin"]) == ("FPS", 2, "peft_fps")


def test_patterns_mean_the_same_after_saving(tmp_path: Path):
    # files do not keep the order of keys, so it must not matter
    config = FPSConfig(per_neuron=1, budget_pattern={"query": 7, "block.1.query": 1})
    config.save_pretrained(tmp_path)
    assert FPSConfig.from_pretrained(str(tmp_path)).budget_pattern == config.budget_pattern


def test_check_base_is_not_saved(tmp_path: Path):
    config = FPSConfig(check_base="warn")
    assert "check_base" not in config.to_dict()
    config.save_pretrained(tmp_path)
    assert "check_base" not in (tmp_path / CONFIG).read_text()
    assert FPSConfig.from_pretrained(str(tmp_path)).check_base == "error"
    assert FPSConfig.from_pretrained(str(tmp_path), check_base="warn").check_base == "warn"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"format_version": 3}, "at most 2", id="newer"),
        pytest.param({"budget": "0.1"}, "budget is '0.1'", id="wrong-type"),
        pytest.param({"importance": "os.system"}, "importance is 'os.system'", id="wrong-choice"),
        pytest.param({"allocation": {"query": SIZES | {"entries": 7}}}, "allocation", id="wrong-allocation"),
        pytest.param({"record": {"allocation": {"query": 7}}}, "record.allocation['query'] is 7", id="wrong-record"),
    ],
)
def test_a_wrong_file_is_refused_by_every_loader(change: dict[str, Any], message: str, tmp_path: Path):
    FPSConfig().save_pretrained(tmp_path)
    rewrite(tmp_path, **change)
    for loader in (FPSConfig, PeftConfig):
        with pytest.raises((TypeError, ValueError), match=re.escape(message)):
            loader.from_pretrained(str(tmp_path))


def test_a_file_of_another_version_with_unknown_fields_loads_with_peft_warning(tmp_path: Path):
    FPSConfig(budget=0.01).save_pretrained(tmp_path)
    rewrite(tmp_path, from_the_future=1)
    with pytest.warns(UserWarning, match="from_the_future"):
        assert FPSConfig.from_pretrained(str(tmp_path)) == FPSConfig(budget=0.01)


def test_a_folder_without_a_config_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=CONFIG):
        FPSConfig.from_pretrained(str(tmp_path))


# --- the adapter file beside it -------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The folder of a saved adapter with a trained head."""
    adapted(tiny_vit()).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {CONFIG, WEIGHTS}
    return tmp_path


def refused(folder: Path, message: str) -> None:
    """By loading the config alone, and by loading the adapter onto a model, which stays plain."""
    with pytest.raises(ValueError, match=message):
        FPSConfig.from_pretrained(str(folder))
    model = tiny_vit()
    names = set(dict(model.named_modules()))
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(model, str(folder))
    assert set(dict(model.named_modules())) == names
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_intact_folder_is_accepted_and_computes_what_was_saved(saved: Path):
    assert FPSConfig.from_pretrained(str(saved)).modules_to_save == ["classifier"]
    model, x = PeftModel.from_pretrained(tiny_vit(), str(saved)), torch.zeros(1, 3, 16, 16)
    assert torch.equal(model.eval()(x).logits, adapted(tiny_vit())(x).logits)


def test_a_config_alone_is_accepted(saved: Path):
    (saved / WEIGHTS).unlink()
    assert FPSConfig.from_pretrained(str(saved)).modules_to_save == ["classifier"]


def test_a_pickled_adapter_is_refused_unread(saved: Path):
    (saved / WEIGHTS).unlink()
    (saved / "adapter_model.bin").write_bytes(b"not even a pickle")
    refused(saved, "adapter_model.bin.*expected adapter_model.safetensors.*safe_serialization=True")


@pytest.mark.parametrize("damage", ["empty", "cut", "noise"])
def test_an_unreadable_adapter_is_refused(damage: str, saved: Path):
    content = (saved / WEIGHTS).read_bytes()
    bad = {"empty": b"", "cut": content[: len(content) // 2], "noise": b"\xff" * 100}[damage]
    (saved / WEIGHTS).write_bytes(bad)
    refused(saved, f"{WEIGHTS} is not a readable safetensors file")


def test_a_missing_tensor_of_a_whole_module_is_refused(saved: Path):
    tensors = load_file(saved / WEIGHTS)
    kept = {key: tensor for key, tensor in tensors.items() if "classifier" not in key}
    assert len(kept) == len(tensors) - 2
    save_file(kept, saved / WEIGHTS)
    refused(saved, r"lacks classifier.bias, classifier.weight, expected every tensor")


def test_a_subfolder_is_looked_at_as_well(saved: Path, tmp_path: Path):
    inner = tmp_path / "inner"
    inner.mkdir()
    (saved / CONFIG).rename(inner / CONFIG)
    (inner / WEIGHTS).write_bytes(b"")
    with pytest.raises(ValueError, match="inner.*not a readable safetensors file"):
        FPSConfig.from_pretrained(str(tmp_path), subfolder="inner")
