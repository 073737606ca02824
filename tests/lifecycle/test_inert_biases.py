"""Adapters that leave out biases of keys: what they train, their files, and adapters from before with such biases."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from peft_fps import FPSConfig, Selection, hotswap_adapter
from peft_fps.adapter_folders.soundness import inspect_adapter
from peft_fps.card.facts import read_facts
from peft_fps.lifecycle import plan
from tests.support.helpers import base_bytes, fill, image_batches, images, layers_of, tiny_bert, tiny_vit, tokens


pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")

KEYS = {f"vit.layers.{block}.attention.k_proj" for block in (0, 1)}


def made(model: nn.Module | None = None, **options: Any) -> PeftModel:
    """An adapter with changes that are nowhere zero."""
    adapted = get_peft_model(tiny_vit() if model is None else model, FPSConfig(**{"budget": 0.1} | options))
    fill(adapted)
    return adapted.eval()


@pytest.fixture
def before(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs a function as the package was before: it trains all biases, and knows of none that is left out."""

    def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(plan, "inert_biases", lambda model, names: frozenset())
            return function(*args, **kwargs)

    return run


def biased(model: nn.Module, name: str = "default") -> set[str]:
    return {path for path, layer in layers_of(model).items() if name in layer.fps_bias}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(images()).logits


def test_the_budget_of_key_biases_goes_to_entries(before):
    model = get_peft_model(tiny_vit(), FPSConfig(budget=0.1))
    old = before(get_peft_model, tiny_vit(), FPSConfig(budget=0.1))
    report, former = (each.calibrate(image_batches(), progress=False) for each in (model, old))
    assert biased(old) - biased(model) == KEYS == set(report.inert_biases)
    assert report.biases == former.biases - 2 * 32
    assert former.inert_biases == {}
    assert report.entries > former.entries
    assert report.trained <= int(0.1 * report.base_parameters) < report.trained + len(report.layers)
    assert report.trained + report.head_parameters == model.get_nb_trainable_parameters()[0]
    assert "biases of 2 key projections (64 numbers) are left out: softmax cancels them" in str(report)
    model(images()).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)  # which DDP needs


def test_gates_let_biases_of_keys_count():
    model = get_peft_model(tiny_vit(), FPSConfig(budget=0.1, token_gate="threshold"))
    assert biased(model) >= KEYS
    assert model.selection_report().inert_biases == {}


@pytest.mark.parametrize("options", [{}, {"budget": 0, "bias": "with_norms"}, {"granularity": "model"}], ids=str)
def test_what_is_counted_is_what_is_trained(tmp_path: Path, options: dict[str, Any]):
    model = made(**options)
    report, config = model.selection_report(), model.peft_config["default"]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))
    assert biased(loaded) == biased(model)
    assert loaded.selection_report().biases == report.biases
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(tensor.nbytes for tensor in stored.values()) == report.bytes
    inspection = inspect_adapter(tmp_path)
    assert inspection.problem is None
    assert inspection.to_dict()["totals"]["biases"] == report.biases
    assert inspection.biases.keys() == biased(model)
    assert read_facts(tmp_path, config, config.to_save, None).biases == report.biases
    fresh = get_peft_model(tiny_vit(), FPSConfig(**{"budget": 0.1} | options)).eval()
    fresh.load_adapter(tmp_path, "default")
    assert torch.equal(logits(fresh), logits(model))


def test_versions_from_before_load_the_file_and_compute_the_same(tmp_path: Path, before):
    model = made()
    model.save_pretrained(tmp_path)
    old = before(PeftModel.from_pretrained, tiny_vit(), tmp_path).eval()
    assert torch.equal(logits(old), logits(model))
    assert all(not layers_of(old)[path].fps_bias["default"].any() for path in KEYS)
    start = base_bytes(old)
    old.merge_adapter()
    merged = {path: layers_of(old)[path].base_layer.bias.clone() for path in KEYS}
    old.unmerge_adapter()
    assert base_bytes(old) == start
    for path, bias in merged.items():
        assert torch.equal(bias, tiny_vit().get_submodule(path).bias)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_adapters_from_before_keep_their_key_biases(tmp_path: Path, before, low_cpu_mem_usage: bool):
    old = before(made)
    old.save_pretrained(tmp_path / "old")
    model = PeftModel.from_pretrained(
        tiny_vit(), tmp_path / "old", is_trainable=not low_cpu_mem_usage, low_cpu_mem_usage=low_cpu_mem_usage
    ).eval()
    assert torch.equal(logits(model), logits(old))
    assert biased(model) == biased(old)
    trainable = {layers_of(model)[path].fps_bias["default"].requires_grad for path in KEYS}
    assert trainable == {not low_cpu_mem_usage}
    assert model.selection_report().biases == old.selection_report().biases
    model.save_pretrained(tmp_path / "again")
    name = "adapter_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "old" / name).read_bytes()
    for path in KEYS:
        assert torch.equal(layers_of(model)[path].fps_bias["default"], layers_of(old)[path].fps_bias["default"])
    assert torch.equal(logits(model.merge_and_unload()), logits(old.merge_and_unload()))


def test_a_new_adapter_takes_up_a_file_from_before_as_a_resumed_trainer_does(tmp_path: Path, before):
    old = before(made)
    old.save_pretrained(tmp_path)
    model = get_peft_model(tiny_vit(), FPSConfig(budget=0.1)).eval()
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(logits(model), logits(old))
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        name for name, p in old.named_parameters() if p.requires_grad
    ]


def test_hot_swap_in_both_directions(tmp_path: Path, before):
    new, old = made(), before(made)
    new.save_pretrained(tmp_path / "new")
    old.save_pretrained(tmp_path / "old")
    model = PeftModel.from_pretrained(tiny_vit(), tmp_path / "new").eval()
    for folder, expected in [("old", old), ("new", new), ("old", old)]:
        hotswap_adapter(model, str(tmp_path / folder), "default")
        assert torch.equal(logits(model), logits(expected))
        assert biased(model) == biased(expected)


def test_state_dicts_in_both_directions(before):
    new, old = made(), before(made)
    target = PeftModel(tiny_vit(), FPSConfig(budget=0.1)).eval()
    for source in (old, new, old):
        target.load_state_dict(source.state_dict())
        assert torch.equal(logits(target), logits(source))
        assert biased(target) == biased(source)


def test_sums_of_adapters(tmp_path: Path, before):
    before(made).save_pretrained(tmp_path)
    model = made()
    model.load_adapter(tmp_path, "old")
    for name, parts, expected in [("two", ["default", "old"], KEYS), ("one", ["default"], set())]:
        model.base_model.add_weighted_adapter(parts, [0.5] * len(parts), name, modules_to_save_from="default")
        assert biased(model, name) & KEYS == expected
    for path in KEYS:
        bias = layers_of(model)[path].fps_bias
        torch.testing.assert_close(bias["two"], 0.5 * bias["old"])
    assert model.peft_config["one"].budget <= 0.1


def test_copies_and_selections(before):
    model, old = made(), before(made)
    for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(each), logits(model))
        assert each.selection_report().inert_biases == model.selection_report().inert_biases
    model.add_adapter("ref", model.peft_config["default"])
    assert biased(model, "ref") == biased(model)
    fresh = get_peft_model(tiny_vit(), FPSConfig(budget=0.1))
    Selection.of(model, "default").apply(fresh)
    Selection.of(old).apply(fresh)
    assert biased(fresh) == biased(model)
    assert fresh.selection_report().entries == old.selection_report().entries


def test_modules_that_data_does_not_reach(tmp_path: Path):
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert, self.skips = tiny_bert(), True

        def forward(self, input_ids: Tensor) -> Tensor:
            layers, last = self.bert.bert.encoder.layer, self.bert.bert.encoder.layer[-1]
            x = self.bert.bert.embeddings(input_ids)
            for layer in layers[:-1] if self.skips else [*layers[:-1], last]:
                x = layer(x)
            return x

    model = get_peft_model(Skips().eval(), FPSConfig(budget=0.2, target_modules=["query", "key", "value"]))
    model.base_model.model.skips = True
    data = [{"input_ids": tokens()}]
    with pytest.warns(UserWarning, match="3 of 6 modules saw no input"):
        report = model.calibrate(data, progress=False)
    assert len(report.inert_biases) == 1
    assert report.trained <= int(0.2 * report.base_parameters)
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    model.base_model.model.skips = False
    report = model.calibrate(data, progress=False)
    assert len(report.inert_biases) == 2
    assert all(layer.entries for layer in report.layers)


def test_keys_alone_without_entries_are_refused_with_the_reason():
    with pytest.raises(ValueError, match="Nothing would be trained.*biases of keys"):
        get_peft_model(tiny_vit(), FPSConfig(budget=0, target_modules=["k_proj"]))
