"""PSCP, and the operations that it counts."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_fps import FPSConfig
from peft_fps.benchmarks.transfer.soft_score import SoftScore, extra_operations, reordered_pairs
from tests.support.helpers import tiny_vit


def test_the_score_is_the_accuracy_over_the_costs() -> None:
    assert SoftScore(0.8, 0.0, 0.0, 0.0).value() == 0.8
    assert SoftScore(0.8, 1.0, 0.0, 1.0).value() == pytest.approx(0.2)
    assert SoftScore(0.8, 0.0, -0.2, 0.0).value() == pytest.approx(1.0)
    assert SoftScore(0.8, 1.0, -0.75, 3.0).value(2.0, 0.5, 0.5) == pytest.approx(0.8 / (4 * 0.5 * 2))


def test_pairs_that_a_weight_reorders_are_counted() -> None:
    cheap, dear = SoftScore(0.6, 0.0, 0.0, 0.1), SoftScore(0.8, 0.0, 0.0, 0.4)
    # 0.545 : 0.571 at β_m = 1, and 0.496 : 0.408 at 2
    assert reordered_pairs([cheap, dear]) == (0.0, 0.0, 1.0)
    assert reordered_pairs([cheap, dear, SoftScore(0.1, 0.0, 0.0, 0.0)]) == (0.0, 0.0, pytest.approx(1 / 3))


def one_image(size: int = 16) -> dict[str, Any]:
    return {"pixel_values": torch.zeros(1, 3, size, size), "interpolate_pos_encoding": size != 16}


def products(tokens: list[int], width: int = 32, hidden: int = 64) -> int:
    """Multiply-adds of the blocks of a ViT, of attention and MLP with their numbers of tokens in turn."""
    pairs = zip(tokens[::2], tokens[1::2], strict=True)
    return sum(4 * a * width**2 + 2 * a * a * width + 2 * m * width * hidden for a, m in pairs)


def test_operations_saved_are_those_of_the_tokens_that_are_left_out() -> None:
    config = FPSConfig(per_neuron=1, importance="magnitude", token_keep_rate=0.5, token_blocks=[0])
    model = get_peft_model(tiny_vit(), config)
    found = extra_operations(model, one_image())
    patches, head = 16 * 48 * 32, 32 * 5
    whole = products([17, 17, 17, 17]) + patches + head
    fewer = products([17, 10, 10, 10]) + patches + head
    assert found == pytest.approx(fewer / whole - 1, abs=0.02)  # fusing and scoring have a few products too
    assert found < -0.2
    assert extra_operations(model, one_image(24)) < -0.2  # of an image of another size


def test_merged_adapters_take_no_more() -> None:
    base = tiny_vit()
    plain = FPSConfig(per_neuron=1, importance="magnitude")
    assert extra_operations(get_peft_model(tiny_vit(), plain), one_image()) == 0
    assert extra_operations(get_peft_model(base, LoraConfig(target_modules=["q_proj"])), one_image()) == 0
    assert extra_operations(nn.Linear(2, 2), {}) == 0


def test_a_gate_cannot_be_merged_and_costs_its_change() -> None:
    config = FPSConfig(per_neuron=1, importance="magnitude", token_gate="threshold")
    model = get_peft_model(tiny_vit(), config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert extra_operations(model, one_image()) >= 0
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
