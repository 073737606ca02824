"""Targets that a model may use past an adapter are left out by default, or named."""

import warnings
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import ParakeetCTCConfig, ParakeetEncoderConfig, ParakeetForCTC

from peft_fps import FPSConfig
from tests.support.helpers import config, fill, layers_of, normal, output


class Asking(nn.Module):
    """Doubles what its linear layers give, as it tells by their class."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)])
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x) * 2 if isinstance(part, (nn.Conv2d, nn.Linear)) else part(x)
        result: Tensor = self.last(x)
        return result


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.asking, self.out = Asking(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.out(self.asking(x))
        return result


class Listed(nn.Module):
    """Calls layers from a plain list, as the mask heads of detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(8, 8), nn.ReLU()]
        for index, layer in enumerate(self.layers):
            self.add_module(str(index), layer)
        self.by_name = {"out": nn.Linear(8, 4)}
        self.out = self.by_name["out"]
        self.attribute = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        result: Tensor = self.attribute(self.by_name["out"](x))
        return result


def seeded(build: Any) -> Any:
    torch.manual_seed(0)
    return build().eval()


def test_layers_whose_class_the_model_asks_for_are_left_out_by_default() -> None:
    base = seeded(Outer)
    expected = output(base, normal(3, 8))
    left_out = r"^3 of 4 layers .* asking\.parts\.0: the forward of Asking asks with isinstance"
    with pytest.warns(UserWarning, match=left_out):
        model = get_peft_model(base, config())
    assert [*layers_of(model)] == ["out"]
    assert torch.equal(output(model, normal(3, 8)), expected)


def test_named_ones_are_adapted_with_a_warning() -> None:
    base = seeded(Outer)
    expected = output(base, normal(3, 8))
    named = r"^asking\.parts\.0, asking\.parts\.2: the forward of Asking asks with isinstance"
    with pytest.warns(UserWarning, match=named):
        model = get_peft_model(base, config(target_modules=["parts.0", "parts.2"]))
    assert not torch.allclose(output(model, normal(3, 8)), expected, atol=1e-3)  # what the warning is about


def test_layers_in_plain_containers_are_named() -> None:
    base = seeded(Listed)
    named = r"^0, out: the model keeps this layer in a plain list or dict besides \(by_name, layers\)"
    with pytest.warns(UserWarning, match=named):
        model = get_peft_model(base, config(bias="none"))
    expected = output(base, normal(3, 8))
    fill(model)
    layers = layers_of(model)
    for path in ("0", "out"):
        layers[path].fps_values["default"].data.mul_(9)  # type: ignore[operator]  # of no effect
    only = seeded(Listed)
    only.attribute.weight.data += layers["attribute"].get_delta_weight("default")
    assert torch.equal(output(model, normal(3, 8)), output(only, normal(3, 8)))
    assert not torch.equal(output(model, normal(3, 8)), expected)


def test_a_transformers_model_that_asks_computes_as_its_base() -> None:
    body = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    encoder = ParakeetEncoderConfig(**body, num_mel_bins=16, subsampling_conv_channels=4, conv_kernel_size=3)
    torch.manual_seed(0)
    base = ParakeetForCTC(ParakeetCTCConfig(vocab_size=20, pad_token_id=0, encoder_config=encoder.to_dict())).eval()
    features, mask = normal(2, 64, 16), torch.ones(2, 64, dtype=torch.int64)
    mask[1, 42:] = 0
    batch = {"input_features": features, "attention_mask": mask}
    expected = base(**batch).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, FPSConfig(budget=0.2)).eval()
    assert not any("subsampling.layers" in path for path in layers_of(model))
    assert torch.equal(model(**batch).logits, expected)
