"""A base model that was compiled before it gets an adapter is treated as if it had not been."""

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.testing import CompileCounter

import peft_fps
from peft_fps import FPSConfig
from tests.support import helpers
from tests.support.helpers import (
    adapted,
    config,
    fill,
    image_batches,
    images,
    layers_of,
    normal,
    through_transformers,
    tiny_mlp,
    unchanged,
)


pytestmark = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning"
)  # torch.compile's own

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
OPTIONS: dict[str, Any] = {"per_neuron": 2, "importance": "random", "bias": "with_norms"}


tiny_vit = partial(helpers.tiny_vit, layers=1)


def wrapped(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def in_parts(model: Any) -> nn.Module:
    for place, block in enumerate(model.vit.layers):
        model.vit.layers[place] = torch.compile(block, backend="eager")
    model.classifier = torch.compile(model.classifier, backend="eager")
    return model


def parts_and_all(model: nn.Module) -> nn.Module:
    return wrapped(in_parts(model))


WAYS = [wrapped, in_place, in_parts, parts_and_all]
ways = pytest.mark.parametrize("compiled", WAYS, ids=lambda way: way.__name__)


def saved(model: Any, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    model.save_pretrained(folder)
    return json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)


@ways
def test_files_are_those_of_the_plain_model(compiled: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    (left_config, left), (right_config, right) = (
        saved(adapted(base, **OPTIONS), tmp_path / name)
        for name, base in (("plain", tiny_vit()), ("compiled", compiled(tiny_vit())))
    )
    assert left.keys() == right.keys()
    for key, tensor in left.items():
        assert torch.equal(tensor, right[key]), key
    assert left_config == right_config
    assert "_orig_mod" not in (tmp_path / "compiled" / "README.md").read_text()


@ways
@torch.no_grad()
def test_it_loads_files_of_a_plain_model(compiled: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    options = {**OPTIONS, "target_modules": ["q_proj"]}  # tracing takes half a second for each layer
    plain = adapted(tiny_vit(), **options)
    plain.save_pretrained(tmp_path)
    expected = plain(pixel_values=images(2)).logits
    torch._dynamo.reset()
    model = PeftModel.from_pretrained(compiled(tiny_vit()), tmp_path).eval()
    torch.testing.assert_close(model(pixel_values=images(2)).logits, expected)
    other = adapted(compiled(tiny_vit()), **{**options, "seed": 3})
    peft_fps.hotswap_adapter(other, str(tmp_path), "default")
    torch.testing.assert_close(other(pixel_values=images(2)).logits, expected)


@ways
def test_a_second_adapter_and_a_merge(compiled: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    plain, model = (adapted(base, **OPTIONS) for base in (tiny_vit(), compiled(tiny_vit())))
    plain.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "again")
    model.set_adapter("again")
    merged, expected = model.merge_and_unload(), plain.merge_and_unload()
    state = expected.state_dict()
    assert merged.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in merged.state_dict().items())


@ways
def test_calibration_report_and_selection(compiled: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    found = []
    torch._dynamo.reset()
    for base in (tiny_vit(), compiled(tiny_vit())):
        model = get_peft_model(base, FPSConfig(per_neuron=2))
        report = model.calibrate(image_batches(), progress=False)
        peft_fps.Selection.of(model).save(tmp_path / "selection.safetensors")
        found.append((report.to_dict(), peft_fps.Selection.load(tmp_path / "selection.safetensors")))
    assert found[0] == found[1]


@pytest.mark.parametrize("importance", ["gradient", "movement"])
def test_calibration_with_labels(importance: str) -> None:
    batches = [{**batch, "labels": torch.tensor([0, 1, 2, 3])} for batch in image_batches(2)]
    selections = []
    for base in (tiny_vit(), parts_and_all(tiny_vit())):
        model = get_peft_model(base, FPSConfig(per_neuron=2, importance=importance))
        model.calibrate(batches, progress=False)
        selections.append(peft_fps.Selection.of(model))
    assert selections[0] == selections[1]


@pytest.mark.parametrize("compiled", [wrapped, in_place], ids=lambda way: way.__name__)
def test_it_still_runs_compiled(compiled: Callable[[nn.Module], nn.Module]) -> None:
    torch._dynamo.reset()
    counter, base = CompileCounter(), tiny_mlp()
    if compiled is wrapped:
        base = torch.compile(base, backend=counter, fullgraph=True)
    else:
        base.compile(backend=counter, fullgraph=True)
    model = adapted(base)
    result = model(normal(3, 10))
    assert counter.frame_count == 1
    result.sum().backward()
    assert layers_of(model)["first"].fps_values["default"].grad is not None
    twice = torch.compile(model, backend="eager")
    torch.testing.assert_close(twice(normal(3, 10)), result)
    torch.testing.assert_close(copy.deepcopy(model)(normal(3, 10)), result)


def test_injection_without_a_peft_model() -> None:
    model = inject_adapter_in_model(config(), wrapped(tiny_mlp()))
    assert set(layers_of(model)) == {"first", "last"}


@through_transformers
def test_an_adapter_added_by_transformers() -> None:
    compiled: Any = wrapped(tiny_vit())
    compiled.add_adapter(config())
    assert not any("_orig_mod" in name for name in compiled.peft_config["default"].target_modules)


@pytest.mark.parametrize("target", ["nothing", "dropout"])
def test_a_refusal_leaves_the_wrappers_in_place(target: str) -> None:
    base = parts_and_all(tiny_vit())
    names = [name for name, _ in base.named_modules()]
    with unchanged(base), pytest.raises(ValueError, match="No modules|expected one of Linear"):
        get_peft_model(base, config(target_modules=[target]))
    assert [name for name, _ in base.named_modules()] == names
    assert not any(module._compiled_call_impl for module in base.modules())


def test_parts_that_are_compiled_after_the_adapter_was_added(tmp_path: Path) -> None:
    model = adapted(tiny_vit(), **OPTIONS)
    expected_config, expected = saved(model, tmp_path / "before")
    in_parts(model.get_base_model())
    found_config, found = saved(model, tmp_path / "after")
    assert found.keys() == expected.keys()
    assert found_config == expected_config
    model.add_adapter("second", config(**OPTIONS))
    fill(model, "second")
    model.set_adapter("second")
    assert (
        peft_fps.Selection.of(model, "second").modules.keys() == peft_fps.Selection.of(model, "default").modules.keys()
    )


def test_verbs_on_a_compiled_peft_model() -> None:
    model = adapted(tiny_vit(), **OPTIONS)
    compiled = torch.compile(model, backend="eager")
    assert peft_fps.selection_report(compiled).to_dict() == peft_fps.selection_report(model).to_dict()
    peft_fps.calibrate(compiled, discard_values=True, progress=False)
