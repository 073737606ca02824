"""The PEFT configs of the methods that are compared, each within a share of the backbone's parameters."""

from collections.abc import Callable
from typing import Any

from peft import LoraConfig, PeftConfig, ShiraConfig
from peft.tuners.supertuning import SupertuningConfig
from torch import nn
from transformers import PreTrainedModel

from peft_fps.base.head import output_head
from peft_fps.config import FPSConfig
from peft_fps.targets.base_parameters import count_base_parameters
from peft_fps.tokens.token_placement import quarter_blocks
from peft_fps.tokens.vision_trunk import vision_trunk


QUERIES_VALUES = ("q_proj", "v_proj", "query", "value")
"""How the paths of the layers of queries and values end."""

Build = Callable[[PreTrainedModel, float | None, int], PeftConfig]
"""From a model, a share of its backbone to train, and a seed to a config."""


def selecting(**options: Any) -> Build:
    """Return a method of this package: the best entries by some importance, without biases unless asked for."""

    def build(base: PreTrainedModel, share: float | None, seed: int) -> PeftConfig:
        budget = {} if share is None else {"budget": share}
        return FPSConfig(**({"bias": "none"} | budget | options), seed=seed)

    return build


def selecting_at_quarters(**options: Any) -> Build:
    """Return a method of this package that selects tokens in the blocks of TR-PTS's code, 4, 7 and 10 of 12."""

    def build(base: PreTrainedModel, share: float | None, seed: int) -> PeftConfig:
        blocks = quarter_blocks(len(vision_trunk(base).blocks))
        return selecting(token_blocks=blocks, **options)(base, share, seed)

    return build


def bitfit(base: PreTrainedModel, share: float | None, seed: int) -> PeftConfig:
    """Return the config of BitFit, which has no budget."""
    return FPSConfig.preset("bitfit", seed=seed)


def lora(base: PreTrainedModel, share: float | None, seed: int) -> PeftConfig:
    """Return the config of LoRA of rank 1, on layers that stay within the budget."""
    return LoraConfig(r=1, lora_alpha=1, target_modules=_within(base, share), modules_to_save=list(output_head(base)))


def shira(base: PreTrainedModel, share: float | None, seed: int) -> PeftConfig:
    """Return the config of SHiRA, on layers that stay within the budget."""
    return ShiraConfig(
        r=1, random_seed=seed, target_modules=_within(base, share), modules_to_save=list(output_head(base))
    )


def supertuning(base: PreTrainedModel, share: float | None, seed: int) -> PeftConfig:
    """Return the config of PEFT's Super-Tuning on all linear layers, at a sparsity that meets the budget."""
    assert share is not None
    layers = linear_layers(base)
    held = sum(layer.weight.numel() for layer in layers.values())
    return SupertuningConfig(
        sparsity=1 - share * count_base_parameters(base) / held,
        target_modules=list(layers),
        modules_to_save=list(output_head(base)),
    )


def lora_queries_values(base: PreTrainedModel, share: float | None, seed: int) -> PeftConfig:
    """Return the config of LoRA of rank 1 on queries and values, without the head."""
    return LoraConfig(r=1, lora_alpha=1, target_modules=list(_queries_values(base)))


def biases_beside_lora(base: PreTrainedModel, share: float | None, seed: int) -> PeftConfig:
    """Return the config of FPS with biases, with what a rank of 1 on queries and values leaves of the budget."""
    assert share is not None
    spent = sum(layer.in_features + layer.out_features for layer in _queries_values(base).values())
    left = share - spent / count_base_parameters(base)
    if left <= 0:
        raise ValueError(
            f"A rank of 1 on queries and values trains {spent:,} parameters, all of the budget {share} of a "
            f"{type(base).__name__} or more, expected a larger budget, with room for FPS besides."
        )
    return selecting(bias="all")(base, left, seed)


def _queries_values(base: PreTrainedModel) -> dict[str, nn.Linear]:
    return {name: layer for name, layer in linear_layers(base).items() if name.endswith(QUERIES_VALUES)}


def _within(base: PreTrainedModel, share: float | None) -> list[str]:
    """Return the linear layers that a rank of 1 can train within the share: all, or attention's, or fewer of these."""
    assert share is not None
    layers = linear_layers(base)
    kinds = [("",), (*QUERIES_VALUES, "k_proj", "key"), QUERIES_VALUES]
    for endings in kinds:
        chosen = [name for name in layers if name.endswith(endings)]
        size = sum(layers[name].in_features + layers[name].out_features for name in chosen)
        if chosen and size <= share * count_base_parameters(base):
            return chosen
    raise ValueError(
        f"A rank of 1 on queries and values trains more than the budget {share} of a {type(base).__name__}, expected "
        "a larger budget for methods that train whole rows and columns."
    )


def linear_layers(base: PreTrainedModel) -> dict[str, nn.Linear]:
    """Return all linear layers outside the output head by path."""
    heads = tuple(output_head(base))
    return {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(heads)
    }
