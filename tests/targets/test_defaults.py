"""The default device and dtype are for tensors that a user makes; what the package makes goes by the model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import peft_fps
from peft_fps import FPSConfig
from tests.support.helpers import adapted, config, fill, image_batches, images, layers_of, tiny_vit


@contextmanager
def on_meta() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def in_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS: dict[str, Callable[[], Any]] = {
    "set_default_device": on_meta,
    "with torch.device": lambda: torch.device("meta"),
    "float64": lambda: in_dtype(torch.float64),
    "bfloat16": lambda: in_dtype(torch.bfloat16),
}
defaults = pytest.mark.parametrize("default", DEFAULTS)


REFERENCES: dict[str, Any] = {}
"""What runs without another default give, by what they do."""


def assert_same(text: str, run: Callable[[Callable[[], Any]], Any], default: str) -> None:
    """`run` takes a context to work in."""
    if text not in REFERENCES:
        REFERENCES[text] = run(torch.enable_grad)
    torch.testing.assert_close(run(DEFAULTS[default]), REFERENCES[text], rtol=0, atol=0)


@defaults
@pytest.mark.parametrize(
    "options",
    [
        {"importance": "magnitude", "granularity": "model", "budget": 0.2},
        {"importance": "magnitude", "granularity": "block", "budget": 0.2, "bias": "with_norms"},
        {"importance": "magnitude", "granularity": "row", "budget": 0.2},
        {"importance": "random"},
        {"importance": "activation"},
        {"importance": "gradient"},
        {"importance": "movement"},
        {"init_weights": False},
    ],
    ids=str,
)
def test_attaching_and_calibrating(options: dict[str, Any], default: str) -> None:
    batches = [{**batch, "labels": torch.tensor([0, 1, 2, 3])} for batch in image_batches(2)]
    options = options if "budget" in options else {"per_neuron": 2, **options}

    def run(make: Callable[[], Any]) -> dict[str, Tensor]:
        base = tiny_vit()
        torch.manual_seed(0)
        with make():
            model = get_peft_model(base, FPSConfig(**options))
            if options.get("init_weights", True):
                model.calibrate(batches, progress=False)
        return dict(model.state_dict())

    assert_same(str(options), run, default)


@pytest.mark.parametrize("accumulators", ["cpu", "streaming"])
@defaults
def test_accumulators(accumulators: str, default: str) -> None:
    batches = [{**batch, "labels": torch.tensor([0, 1, 2, 3])} for batch in image_batches(2)]

    def run(make: Callable[[], Any]) -> dict[str, Tensor]:
        model = get_peft_model(tiny_vit(), FPSConfig(importance="fisher", per_neuron=2))
        with make():
            model.calibrate(batches, progress=False, accumulators=accumulators)
        return dict(model.state_dict())

    assert_same(accumulators, run, default)


@defaults
def test_life_of_an_adapter(default: str, tmp_path: Path) -> None:
    def run(make: Callable[[], Any]) -> tuple[Any, ...]:
        folder = tmp_path / ("reference" if make is torch.enable_grad else default)
        bases, x = [tiny_vit() for _ in range(2)], images(2)
        model = adapted(tiny_vit(), importance="random", bias="with_norms")
        with make():
            model(pixel_values=x).logits.square().sum().backward()
            gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
            model.save_pretrained(folder)
            loaded = PeftModel.from_pretrained(bases[0], folder).eval()
            lazily = PeftModel.from_pretrained(bases[1], folder, low_cpu_mem_usage=True)
            peft_fps.Selection.of(model).apply(loaded, discard_values=True)
            peft_fps.hotswap_adapter(loaded, str(folder), "default")
            loaded.add_adapter("b", config())
            loaded.base_model.add_weighted_adapter(["default", "b"], [1.0, 0.5], "c", modules_to_save_from="default")
            loaded.set_adapter("c")
            result = loaded(pixel_values=x).logits
            loaded.merge_adapter()
            merged = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
            loaded.unmerge_adapter()
        return gradients, dict(lazily.state_dict()), result, merged, dict(loaded.state_dict())

    assert_same("life", run, default)


def test_the_kernel_writes_to_the_cpu_whatever_the_default_device() -> None:
    with torch.device("cpu"):
        base, x = nn.Sequential(nn.Linear(200, 100)), torch.randn(300, 200)
    model = adapted(base, per_neuron=1)
    fill(model)
    found = []
    for make in (torch.enable_grad, on_meta):
        with make():
            model.zero_grad()
            model(x).square().sum().backward()
        found.append([parameter.grad for parameter in layers_of(model)["0"].adapter_parameters("default")])
    torch.testing.assert_close(*found)


def test_a_model_made_on_meta_gets_an_adapter_there() -> None:
    with torch.device("meta"):
        base = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 5))
        model = get_peft_model(base, config())
    for layer in layers_of(model).values():
        assert {tensor.device.type for tensor in layer.adapter_parameters("default")} == {"meta"}
