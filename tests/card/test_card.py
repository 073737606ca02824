"""The model card of an adapter: what it says, where it stands, and what it leaves alone."""

import ast
import json
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset, DatasetInfo, NamedSplit
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, __version__, get_peft_model

from peft_fps import FPSConfig, save_adapter
from peft_fps.card import evaluation_at
from peft_fps.card.facts import Facts
from peft_fps.card.markdown import BEGIN, END, code, loading_snippet, plain, put, render
from peft_fps.hub import write_card
from peft_fps.layers.adapter_state import AdapterState, Evaluation
from tests.support.helpers import (
    CHARACTERS,
    adapted,
    config,
    images,
    layers_of,
    through_transformers,
    tiny_bert,
    tiny_mlp,
    tiny_vit,
)


CARD, CONFIG, WEIGHTS = "README.md", "adapter_config.json", "adapter_model.safetensors"

FACTS: dict[str, Any] = {
    "settings": {
        "importance": "activation",
        "order": "top",
        "granularity": "neuron",
        "bias": "all",
        "budget": 0.0077,
        "per_neuron": None,
        "budget_pattern": {},
    },
    "method": "weight magnitude x mean |input| over 1,297 examples, granularity neuron",
    "calibration": {"importance": "activation", "norm": "l1", "batches": 21, "examples": 1297},
    "modules": 19,
    "weights": 921_600,
    "entries": 2_948,
    "biases": 4_224,
    "base_parameters": 931_968,
    "whole": {"classifier.bias": (10,), "classifier.weight": (10, 192)},
    "file": WEIGHTS,
    "bytes": 46_528,
    "format_version": 1,
    "base_model": "google/vit",
    "base_class": "ViTForImageClassification",
    "task": "image-classification",
    "fingerprint": {"sha256": "ab" * 32, "dtype": "float32"},
}


def facts(**changes: Any) -> Facts:
    return Facts(**{**FACTS, **changes})


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    """Metadata and text, read without huggingface_hub."""
    _, metadata, text = (folder / CARD).read_text().split("---\n", 2)
    return yaml.safe_load(metadata), text


def section(text: str) -> str:
    assert text.count(BEGIN) == text.count(END) == 1
    return text.partition(BEGIN)[2].partition(END)[0]


def rows(text: str) -> dict[str, str]:
    """The two-column tables of a text, by their left cells."""
    cells = (re.split(r"(?<!\\)\|", line) for line in text.splitlines() if line.startswith("| "))
    return {left.strip(): right.strip() for _, left, right, _ in cells}


def snippet(text: str) -> str:
    return text.partition("```python\n")[2].partition("```")[0]


def state_of(model: PeftModel) -> AdapterState:
    return next(iter(layers_of(model).values())).fps_state["default"]


def noted(model: PeftModel, step: int = 24, **metrics: float) -> None:
    state_of(model).evaluation = Evaluation(step, metrics)


@pytest.fixture
def model() -> PeftModel:
    return adapted(tiny_vit())


# --- the text -------------------------------------------------------------------------------------------------------


def test_the_table_says_what_was_asked_for_and_what_it_came_to() -> None:
    found = rows(render(facts()))
    assert found["method"] == "FPS, `importance='activation'`, `order='top'`, `granularity='neuron'`, `bias='all'`"
    assert found["asked for"] == "0.77 % of the base model's parameters"
    assert found["entries"] == "2,948 in 19 modules, 0.3199 % of their weights"  # 2948 / 921600
    assert found["biases"] == "4,224"
    # (2948 + 4224) / 931968 = 0.0076955...
    assert found["together"] == "7,172, 0.7696 % of 931,968 parameters without the output head"
    assert found["trained whole"] == "1,930 parameters: `classifier.bias`, `classifier.weight`"
    assert found["calibration"] == '`{"batches": 21, "examples": 1297, "importance": "activation", "norm": "l1"}`'
    assert found["base model"] == "`google/vit`"
    assert found["its fingerprint"] == f"`{'ab' * 32}`, `float32`"
    assert found["file"] == "`adapter_model.safetensors`, 46,528 bytes, format version 1"


def test_many_tensors_are_counted_rather_than_listed() -> None:
    many = {f"layer.{number}.weight": (3, 2) for number in range(9)}
    assert rows(render(facts(whole=many)))["trained whole"] == "54 parameters: 9 tensors"


def test_what_is_unknown_is_left_out() -> None:
    unknown = {"biases": None, "base_parameters": None, "calibration": None, "whole": {}, "base_model": None}
    found = rows(render(facts(**unknown, fingerprint=None)))
    assert set(found) == {"", "---", "method", "asked for", "entries", "file"}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"budget": None, "per_neuron": 6.89}, "6.89 entries per neuron"),
        ({"budget": 0.0}, "0 % of the base model's parameters"),
        ({"budget_pattern": {"mlp.fc2": 0.02}}, '0.77 % of the base model\'s parameters, except `{"mlp.fc2": 0.02}`'),
    ],
)
def test_the_budget_is_told_as_it_was_asked_for(settings: dict[str, Any], expected: str) -> None:
    asked = facts(settings={**FACTS["settings"], **settings})
    assert rows(render(asked))["asked for"] == expected


def test_results_and_picture_have_their_place() -> None:
    beans = {"name": "beans", "type": "beans", "split": "test"}
    measured = Evaluation(1, {"loss": 0.12345678, "accuracy": 0.9}, beans)
    text = render(facts(evaluation=measured, picture="selection.png"))
    assert "By the Trainer on beans, test, after 1 training step:" in text
    assert {"`loss`": "0.1235", "`accuracy`": "0.9"}.items() <= rows(text).items()
    assert "](selection.png)" in text
    without = render(facts())
    assert "Evaluation" not in without
    assert "](" not in without


def test_the_snippet_names_class_base_labels_and_place() -> None:
    told = loading_snippet(facts(location="me/digits", subfolder="cats"))
    assert told.splitlines()[0].startswith("import peft_fps")
    load = 'ViTForImageClassification.from_pretrained("google/vit", num_labels=10, ignore_mismatched_sizes=True)'
    assert f"model = {load}\n" in told
    assert 'PeftModel.from_pretrained(model, "me/digits", subfolder="cats")' in told
    two = {"a.weight": (8, 8), "b.weight": (3, 8)}
    for other in ({"whole": two}, {"whole": {}}, {"task": "text-generation"}):
        assert "num_labels" not in loading_snippet(facts(**other))
    assert "model = ...  # the base model" in loading_snippet(facts(base_class=None))


STRANGE = st.text(CHARACTERS, max_size=30) | st.sampled_from(
    ['a"); import os; os.remove("x")  #', "`|` \\", f"x {END} y", f"{BEGIN}", "## head\n```\n", "<script>", "x" * 9999]
)


@given(STRANGE, STRANGE, STRANGE)
def test_no_value_breaks_out_of_its_place(name: str, method: str, detail: str) -> None:
    """Whatever a config says that comes from anywhere: the code stays code, the table two columns, the marks two."""
    odd = {"base_model": name, "base_class": name, "method": method, "calibration": {"norm": detail}}
    part = render(facts(**odd, location=detail))
    text = put("# Mine", part)
    assert text.count(BEGIN) == text.count(END) == 1
    assert put(text, part) == text
    assert {"method", "calibration", "base model"} <= set(rows(text))
    calls = [node for node in ast.walk(ast.parse(snippet(text))) if isinstance(node, ast.Call)]
    assert len(calls) == (3 if name.isidentifier() else 2)
    assert text.count("```") == 2 + code(name).count("```")


@pytest.mark.parametrize("text", ["a|b", "`a` \\ *b* _c_ [d](e) <f>"])
def test_plain_text_escapes_what_markdown_would_read(text: str) -> None:
    assert re.sub(r"\\(.)", r"\1", plain(text)) == text
    assert not re.search(r"(?<!\\)[`*_\[\]<>|]", plain(text))


# --- its place ------------------------------------------------------------------------------------------------------

PLACES = {
    "before the first heading": ("# T\n\nHello.\n\n## A\n\n## B\n", "# T\n\nHello.\n\n{}\n\n## A\n\n## B\n"),
    "not in code": ("# T\n\n```\n## no\n```\n\n## A", "# T\n\n```\n## no\n```\n\n{}\n\n## A"),
    "at the end": ("# T\n\nHello.\n", "# T\n\nHello.\n\n{}"),
    "where it was": (f"# T\n\n## A\n\n{BEGIN}\nold\n{END}\n\nend", "# T\n\n## A\n\n{}\n\nend"),
    "a mark alone is text": (f"{BEGIN} x\n\n## A\n", f"{BEGIN} x\n\n{{}}\n\n## A\n"),
    "an end alone is text": (f"x {END}\n## A\n", f"x {END}\n{{}}\n\n## A\n"),
}


@pytest.mark.parametrize("place", PLACES)
def test_the_part_is_put_where_it_belongs(place: str) -> None:
    text, expected = PLACES[place]
    once = put(text, "new")
    assert once == expected.format(f"{BEGIN}\nnew\n{END}")
    if place != "an end alone is text":
        assert put(once, "new") == once


# --- results --------------------------------------------------------------------------------------------------------

LOG = [
    {"loss": 1.0, "step": 2},
    {
        "eval_loss": 0.5,
        "eval_accuracy": 0.8,
        "eval_runtime": 1.0,
        "eval_samples_per_second": 3.0,
        "epoch": 1,
        "step": 2,
    },
    {"eval_loss": 0.4, "eval_steps_per_second": 4.0, "eval_f1": float("nan"), "eval_name": "x", "step": 4},
    {"eval_other_loss": 0.6, "step": 4},
    {"test_loss": 0.3, "step": 5},
]


def test_the_metrics_of_a_step_are_taken_from_the_log() -> None:
    assert evaluation_at(2, LOG) == Evaluation(2, {"loss": 0.5, "accuracy": 0.8})
    assert evaluation_at(4, LOG) == Evaluation(4, {"loss": 0.4, "other_loss": 0.6})
    assert evaluation_at(5, LOG) is None
    assert evaluation_at(3, LOG) is None


@pytest.mark.parametrize(
    ("builder", "expected"),
    [
        ("beans", {"name": "beans", "type": "beans", "config": "default", "split": "test"}),
        ("imagefolder", {"name": "evaluation set", "type": "unknown"}),
    ],
)
def test_a_data_set_of_the_hub_is_named(builder: str, expected: dict[str, str]) -> None:
    info = DatasetInfo(builder_name=builder, config_name="default")
    data = Dataset.from_dict({"x": [1]}, info=info, split=NamedSplit("test"))
    found = evaluation_at(2, LOG, data)
    assert found is not None
    assert found.dataset == expected


def test_results_stand_in_the_metadata_until_they_no_longer_hold(model: PeftModel, tmp_path: Path) -> None:
    mine = {
        "task": {"type": "image-classification"},
        "dataset": {"name": "Mine", "type": "mine"},
        "metrics": [{"type": "accuracy", "value": 0.5, "name": "accuracy after lunch"}],
    }
    metadata = {"model-index": [{"name": "m", "results": [mine]}]}
    (tmp_path / CARD).write_text(f"---\n{yaml.safe_dump(metadata)}---\n# M\n")
    noted(model, accuracy=0.75, loss=0.25)
    model.save_pretrained(tmp_path)
    [index] = card_of(tmp_path)[0]["model-index"]
    ours = {
        "task": {"type": "image-classification"},
        "dataset": {"name": "evaluation set", "type": "unknown"},
        "metrics": [
            {"type": "accuracy", "value": 0.75, "name": "accuracy after 24 training steps"},
            {"type": "loss", "value": 0.25, "name": "loss after 24 training steps"},
        ],
    }
    assert index == {"name": "m", "results": [mine, ours]}
    state_of(model).evaluation = None
    model.save_pretrained(tmp_path)
    assert card_of(tmp_path)[0]["model-index"] == metadata["model-index"]


@pytest.mark.filterwarnings("ignore:Could not find a config file")
def test_results_alone_come_and_go(model: PeftModel, tmp_path: Path) -> None:
    model.peft_config["default"].base_model_name_or_path = "google/vit-tiny"
    noted(model, accuracy=0.75)
    model.save_pretrained(tmp_path)
    assert card_of(tmp_path)[0]["model-index"][0]["name"] == "vit-tiny-fps"
    state_of(model).evaluation = None
    model.save_pretrained(tmp_path)
    assert not {"model-index", "model_name", "eval_results"} & set(card_of(tmp_path)[0])


# --- saving ---------------------------------------------------------------------------------------------------------


def test_saving_completes_the_card_that_peft_writes(model: PeftModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    metadata, text = card_of(tmp_path)
    assert metadata["library_name"] == "peft"
    assert metadata["base_model"] == ""  # as PEFT writes it for a model without a name
    assert {"peft", "peft_fps", "transformers"} <= set(metadata["tags"])
    assert f"- PEFT {__version__}" in text
    layers, found = layers_of(model).values(), rows(section(text))
    entries = sum(int(layer.fps_row_counts["default"].sum()) for layer in layers)
    weights = sum(layer.base_layer.weight.numel() for layer in layers)
    biases = sum(module.base_layer.bias.numel() for path, module in layers_of(model).items() if "k_proj" not in path)
    share = f"{100 * entries / weights:.4g} % of their weights"
    assert found["entries"] == f"{entries:,} in {len(layers)} modules, {share}"
    assert found["biases"] == f"{biases:,}"
    size = (tmp_path / WEIGHTS).stat().st_size
    assert found["file"] == f"`{WEIGHTS}`, {size:,} bytes, format version 2"
    digest = json.loads((tmp_path / CONFIG).read_text())["record"]["base_fingerprint"]["sha256"]
    assert found["its fingerprint"] == f"`{digest}`, `float32`"


def test_saving_again_gives_the_same_card_to_the_byte(model: PeftModel, tmp_path: Path) -> None:
    noted(model, accuracy=0.5)
    model.save_pretrained(tmp_path)
    first = (tmp_path / CARD).read_bytes()
    for _ in range(2):
        model.save_pretrained(tmp_path)
        assert (tmp_path / CARD).read_bytes() == first
    save_adapter(model, tmp_path)
    write_card(model, tmp_path, picture=False)
    assert (tmp_path / CARD).read_bytes() == first
    assert {path.name for path in tmp_path.iterdir()} == {CARD, CONFIG, WEIGHTS}


@pytest.mark.parametrize("text", ["# Mine\n\nOf *me*.\n\n## Uses\n\nNone.\n\n### Deeper\n", "Of *me*.\n"])
def test_what_a_user_wrote_is_kept(text: str, model: PeftModel, tmp_path: Path) -> None:
    (tmp_path / CARD).write_text(f"---\nlicense: mit\n---\n{text}")
    for _ in range(2):
        model.save_pretrained(tmp_path)
        metadata, found = card_of(tmp_path)
        assert metadata["license"] == "mit"
        rest = found.replace(f"{BEGIN}{section(found)}{END}", "").split()
        assert rest == [*text.split(), "###", "Framework", "versions", "-", "PEFT", __version__]


def test_the_snippet_loads_the_adapter(tmp_path: Path) -> None:
    base = tiny_vit()
    base.save_pretrained(tmp_path / "base")
    model = adapted(type(base).from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    write_card(model, tmp_path / "adapter", location=str(tmp_path / "adapter"), picture=False)
    names: dict[str, Any] = {}
    exec(snippet(card_of(tmp_path / "adapter")[1]), names)
    assert type(names["model"]) is type(base)  # merged
    with torch.no_grad():
        expected = model(images()).logits
        assert not torch.allclose(base(images()).logits, expected, atol=1e-2)
        torch.testing.assert_close(names["model"](images()).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:Could not find a config file")
def test_named_adapters_have_their_cards_beside_them(model: PeftModel, tmp_path: Path) -> None:
    model.add_adapter("cats", config(per_neuron=1))
    model.peft_config["cats"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path)
    assert card_of(tmp_path / "cats")[0]["base_model"] == str(tmp_path / "base")
    entries = {name: rows(section(card_of(tmp_path / name)[1]))["entries"] for name in ("", "cats")}
    assert entries[""].startswith("960 ")  # two of each of 480 neurons
    assert entries["cats"].startswith("480 ")
    first = (tmp_path / "cats" / CARD).read_bytes()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "cats" / CARD).read_bytes() == first
    write_card(model, tmp_path, location="me/pets", picture=False)
    assert '"me/pets", subfolder="cats")' in snippet(card_of(tmp_path / "cats")[1])
    assert '"me/pets")' in snippet(card_of(tmp_path)[1])


def test_adapters_that_share_a_config_have_each_its_own_card(model: PeftModel, tmp_path: Path) -> None:
    shared = config(granularity="model", target_modules=["q_proj"], importance="activation")
    for name in ("cats", "dogs"):
        model.add_adapter(name, shared)
    model.calibrate([{"pixel_values": images()}], adapter_name="cats", progress=False)
    model.save_pretrained(tmp_path)
    cards = {name: (tmp_path / name / CARD).read_bytes() for name in ("", "cats", "dogs")}
    assert "over 4 examples" in cards["cats"].decode()
    assert "until calibrated" not in cards["dogs"].decode()
    assert "over 4 examples" not in cards["dogs"].decode()
    write_card(model, tmp_path, picture=False)
    assert {name: (tmp_path / name / CARD).read_bytes() for name in cards} == cards


def test_task_types_name_the_class(tmp_path: Path) -> None:
    model = get_peft_model(tiny_bert(), config(task_type="SEQ_CLS"))
    noted(model, accuracy=0.5)
    model.save_pretrained(tmp_path)
    metadata, text = card_of(tmp_path)
    assert "AutoModelForSequenceClassification.from_pretrained(" in snippet(text)
    assert "num_labels=3" in snippet(text)
    assert metadata["model-index"][0]["results"][0]["task"] == {"type": "text-classification"}
    first = (tmp_path / CARD).read_bytes()
    write_card(model, tmp_path, picture=False)
    assert (tmp_path / CARD).read_bytes() == first


def test_other_models_and_pickled_adapters_have_a_card_too(tmp_path: Path) -> None:
    model = adapted(tiny_mlp(), target_modules=["first"], bias="none")
    model.save_pretrained(tmp_path / "safe")
    found = section(card_of(tmp_path / "safe")[1])
    assert "model = ...  # the base model" in found
    assert rows(found)["entries"].startswith("24 in 1 modules, 20 %")  # of 12 x 10
    assert rows(found)["biases"] == "0"
    model.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    found = section(card_of(tmp_path / "pickled")[1])
    assert rows(found)["file"].startswith("`adapter_model.bin`, ")
    assert "biases" not in rows(found)
    write_card(model, tmp_path / "pickled")
    assert not (tmp_path / "pickled" / "selection.png").exists()


def test_parameters_of_the_base_model_are_told_if_they_were_counted(model: PeftModel, tmp_path: Path) -> None:
    state_of(model).base_parameters = 20_000
    model.save_pretrained(tmp_path)
    expected = "1,376, 6.88 % of 20,000 parameters without the output head"  # 2 * 480 entries, 480 - 2 * 32 biases
    assert rows(section(card_of(tmp_path)[1]))["together"] == expected


@pytest.mark.parametrize("metadata", ["- a list", "tags: [1, one]", "license: [mit", "model-index: [{}]"])
def test_a_card_that_cannot_be_read_stops_no_saving(metadata: str, model: PeftModel, tmp_path: Path) -> None:
    model.add_adapter("cats", config())
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats" / CARD).write_text(f"---\n{metadata}\n---\nmine")
    with pytest.warns(UserWarning, match=r"README.md was not completed, the adapter itself is saved: "):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "cats" / CARD).read_text() == f"---\n{metadata}\n---\nmine"
    (tmp_path / CARD).write_bytes(b"\xff\x00")
    (tmp_path / ".README.md.saving").write_text("of a process that was killed")
    for folder in (tmp_path, tmp_path / "cats"):  # loading looks at no card
        PeftModel.from_pretrained(tiny_vit(), folder)


@through_transformers
def test_transformers_own_saving_gets_no_card_from_us(tmp_path: Path) -> None:
    model = tiny_vit()
    model.add_adapter(config())
    for _ in range(2):
        model.save_pretrained(tmp_path / "transformers")
    assert not (tmp_path / "transformers" / CARD).exists()


def test_other_configs_and_methods_get_no_card_from_us(tmp_path: Path) -> None:
    FPSConfig().save_pretrained(tmp_path / "config")
    assert [path.name for path in (tmp_path / "config").iterdir()] == [CONFIG]
    lora = get_peft_model(tiny_mlp(), LoraConfig(target_modules=["first"]))
    lora.save_pretrained(tmp_path / "lora")
    before = (tmp_path / "lora" / CARD).read_bytes()
    write_card(lora, tmp_path / "lora")
    assert (tmp_path / "lora" / CARD).read_bytes() == before


# --- the picture ----------------------------------------------------------------------------------------------------


def test_the_picture_comes_on_request_and_goes_with_the_selection(model: PeftModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    write_card(model, tmp_path)
    picture = tmp_path / "selection.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "](selection.png)" in section(card_of(tmp_path)[1])
    first = picture.read_bytes(), (tmp_path / CARD).read_bytes()
    write_card(model, tmp_path)
    assert (picture.read_bytes(), (tmp_path / CARD).read_bytes()) == first
    model.save_pretrained(tmp_path)  # perhaps with another selection
    assert not picture.exists()
    assert "](selection.png)" not in section(card_of(tmp_path)[1])
    picture.write_bytes(b"mine")
    model.save_pretrained(tmp_path)
    assert picture.read_bytes() == b"mine"


def test_without_matplotlib_there_is_no_picture(
    model: PeftModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save_pretrained(tmp_path)
    monkeypatch.delitem(sys.modules, "peft_fps.plots", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_card(model, tmp_path)
    assert not (tmp_path / "selection.png").exists()
    assert "](selection.png)" not in section(card_of(tmp_path)[1])
