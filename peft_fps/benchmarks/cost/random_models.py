"""The models and the batches that are measured."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForImageClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.utils import logging

from peft_fps.benchmarks.cost.workload import Workload


GAIN_SPREAD = 0.3
"""Standard deviation of log E|a| over a layer's inputs in a pre-trained ViT-Ti, the median of its layers."""
SCALED_ROWS = ("v_proj", "fc1", "up_proj")
"""Layers whose outputs reach the next layer without passing a norm."""
QUICK_LAYERS = 2
TOKENS = 128


def vit(layers: int, **sizes: Any) -> ViTForImageClassification:
    """Return a ViT/16 with random weights and a head of 100 classes, for 224 px unless `sizes` say otherwise."""
    return ViTForImageClassification(ViTConfig(**{"num_hidden_layers": layers, "num_labels": 100, **sizes}))


def decoder(layers: int, **sizes: Any) -> LlamaForCausalLM:
    """Return a Llama with random weights, with 28 layers of 0.54 billion parameters, unless `sizes` says otherwise."""
    small: dict[str, Any] = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "vocab_size": 32_000,
    }
    return LlamaForCausalLM(LlamaConfig(**{"num_hidden_layers": layers, "use_cache": False, **small, **sizes}))


NAMED: dict[str, tuple[int, Callable[[int], PreTrainedModel]]] = {
    "vit-b16": (12, vit),
    "vit-l16": (
        24,
        lambda layers: vit(layers, hidden_size=1024, intermediate_size=4096, num_attention_heads=16),
    ),
    "vit-ti16-112px": (
        12,
        lambda layers: vit(layers, image_size=112, hidden_size=192, intermediate_size=768, num_attention_heads=3),
    ),
    "decoder-0.5b": (28, decoder),
    "decoder-1b": (
        16,
        lambda layers: decoder(
            layers, hidden_size=2048, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8
        ),
    ),
}
"""Number of layers and builder of the models that are known by name."""


def build_model(workload: Workload) -> PreTrainedModel:
    """Build or load the model, in float32 on the device.

    A named model has random weights, always the same on a kind of device, with gains that differ between features as
    in a trained one.

    Args:
        workload: its `model` is a name in `NAMED`, a folder, or the name of an image classification model on the Hub.

    Raises:
        ValueError: there is no such model.
    """
    if workload.model in NAMED:
        layers, build = NAMED[workload.model]
        torch.manual_seed(0)
        with torch.device(workload.device):
            model = build(QUICK_LAYERS if workload.quick else layers)
        spread_gains(model)
    else:
        try:
            with _no_progress_bar():
                model = AutoModelForImageClassification.from_pretrained(workload.model, dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"--model is {workload.model!r}, which is none of {', '.join(NAMED)} and could not be loaded as an "
                f"image classification model: {error}"
            ) from error
    return model.to(workload.device).train()  # type: ignore[arg-type]  # transformers' annotation of `to`


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Turn transformers' progress bars off for the block."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@torch.no_grad()
def spread_gains(model: nn.Module) -> None:
    """Multiply features with log-normal gains: norms' weights, and rows where no norm follows.

    With purely random weights all inputs of a layer are equally strong, and the entries that are selected spread over
    nearly all of them, which no pre-trained network shows.
    """
    generator = torch.Generator().manual_seed(0)
    for name, module in model.named_modules():
        norm = isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm")
        if norm or name.endswith(SCALED_ROWS):
            weight: Any = module.weight
            gains = torch.exp(GAIN_SPREAD * torch.randn(weight.shape[0], generator=generator))
            weight.mul_(gains.to(weight).reshape(-1, *[1] * (weight.dim() - 1)))


def copy_model(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy with parameters of its own that lie on the same memory.

    So one process holds many methods on one large model. Training with the learning rate 0 and merging with unmerging
    leave the shared numbers as they are.
    """
    shared: dict[int, Any] = {id(p): nn.Parameter(p.detach()) for p in model.parameters()}
    return copy.deepcopy(model, shared)


def batches(model: PreTrainedModel, size: int, count: int = 1, seed: int = 0) -> list[dict[str, Tensor]]:
    """Return batches of random examples with random labels.

    Args:
        model: an image classifier, or a causal language model.
        size: examples per batch.
        count: number of batches.
        seed: the same seed gives the same batches.

    Returns:
        `pixel_values` `(size, channels, height, width)` with `labels` `(size,)`, or `input_ids` `(size, 128)` with the
        same tokens as `labels`.
    """
    return list(_batches(model, size, count, torch.Generator().manual_seed(seed)))


def _batches(model: PreTrainedModel, size: int, count: int, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
    """Yield the batches of `batches`."""
    config: Any = model.config
    for _ in range(count):
        if reads_images(model):
            side = config.image_size
            height, width = (side, side) if isinstance(side, int) else side
            images = torch.randn(size, getattr(config, "num_channels", 3), height, width, generator=generator)
            labels = torch.randint(config.num_labels, (size,), generator=generator)
            yield {"pixel_values": images.to(model.device), "labels": labels.to(model.device)}
        else:
            tokens = torch.randint(config.vocab_size, (size, TOKENS), generator=generator).to(model.device)
            yield {"input_ids": tokens, "labels": tokens}


def reads_images(model: PreTrainedModel) -> bool:
    """Return whether the model takes images rather than tokens."""
    return model.main_input_name == "pixel_values"


def largest_weight(model: nn.Module) -> int:
    """Return the bytes of the largest weight of a linear or convolutional layer."""
    layers = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    return max(math.prod(layer.weight.shape) * layer.weight.element_size() for layer in layers)
