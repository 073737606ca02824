"""Which blocks select tokens where the user names none."""

from collections import Counter
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import ViTConfig, ViTForImageClassification

from peft_fps import FPSConfig
from tests.support.helpers import normal, weighted_of


def deep_vit() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 8, "num_attention_heads": 2}
        model = ViTForImageClassification(ViTConfig(**sizes, image_size=24, patch_size=4, num_labels=2))
        for index, layer in enumerate(model.vit.layers):  # so that blocks differ in how many large weights they have
            for parameter in layer.parameters():
                parameter.data = torch.randn_like(parameter) * (1, 2, 1.5, 0.5, 2, 0.7, 3, 0.1)[index]
    return model


def fewest(model: Any, share: float = 0.03) -> tuple[int, ...]:
    """The three blocks between the second and the last with the fewest of the largest weights, by sorting them all."""
    scored = [
        (float(weight.detach().abs()), path)
        for path, layer in weighted_of(model).items()
        for weight in layer.base_layer.weight.flatten()
    ]
    best = sorted(scored, reverse=True)[: int(share * len(scored))]
    counts = Counter(int(path.split("layers.")[1].split(".")[0]) for _, path in best if "layers." in path)
    return tuple(sorted(sorted(range(2, 7), key=lambda index: (counts[index], index))[:3]))


@pytest.mark.parametrize("granularity", ["neuron", "block", "model"])
@pytest.mark.parametrize("share", [0.03, 0.4])
def test_the_rule_beside_a_sort_of_all_scores(granularity: str, share: float) -> None:
    config = FPSConfig(
        importance="magnitude", per_neuron=2, granularity=granularity, block_top=share, token_keep_rate=0.5
    )
    model = get_peft_model(deep_vit(), config)
    report = model.selection_report()
    assert report.token_blocks == fewest(model, share)
    assert [report.token_keep_rate, config.token_blocks] == [0.5, None]
    assert "50.0% of the patches stay in blocks" in str(report)


def test_it_is_what_granularity_block_gives_few_entries() -> None:
    options = {"importance": "magnitude", "per_neuron": 4, "granularity": "block", "block_top": 0.3}
    report = get_peft_model(deep_vit(), FPSConfig(**options, token_keep_rate=0.5)).selection_report()
    entries = Counter[int]()
    for layer in report.layers:
        if "layers." in layer.module:
            entries[int(layer.module.split("layers.")[1].split(".")[0])] += layer.entries
    others = set(range(2, 7)) - set(report.token_blocks)
    assert max(entries[index] for index in report.token_blocks) <= min(entries[index] for index in others)


def test_calibration_chooses_anew_and_moves_the_selection() -> None:
    model = get_peft_model(deep_vit(), FPSConfig(per_neuron=1, token_keep_rate=0.5))
    images = normal(4, 3, 24, 24)
    next(iter(weighted_of(model).values())).fps_state["default"].token_blocks = (4,)
    chosen = model.calibrate([{"pixel_values": images}], progress=False).token_blocks
    states = model(images, output_hidden_states=True).hidden_states
    lengths = [state.shape[1] for state in states]
    assert [i for i in range(8) if lengths[i + 1] < lengths[i]] == list(chosen)
    assert chosen != (4,)


def test_a_block_without_targets_has_the_fewest() -> None:
    config = FPSConfig(importance="magnitude", per_neuron=1, token_keep_rate=0.5, exclude_modules=r".*layers\.6\..*")
    assert 6 in get_peft_model(deep_vit(), config).selection_report().token_blocks
