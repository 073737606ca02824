"""FPS written down a second time."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_fps import FPSConfig
from tests.helpers import (
    image_batches,
    images,
    layers_of,
    selected_columns,
    tiny_bert,
    tiny_conv,
    tiny_gpt2,
    tiny_llama,
    tiny_vit,
    tokens,
)
from tests.selection import naive


Rows = list[list[int]]


KINDS = (nn.Linear, nn.Conv2d, Conv1D)


def padded_batches(count: int = 3) -> list[dict[str, Tensor]]:
    found = []
    for i in range(count):
        mask = torch.ones(4, 9, dtype=torch.int64)
        mask[0, 3 + i :], mask[2, 7:] = 0, 0
        found.append({"input_ids": tokens(seed=i), "attention_mask": mask})
    return found


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[Any]], str]] = {
    # model, batches, and the head that is left out
    "vit": (tiny_vit, image_batches, "classifier"),
    "conv": (tiny_conv, lambda: [images(4, seed) for seed in range(3)], "no such head"),
    "gpt2": (tiny_gpt2, padded_batches, "lm_head"),
    "bert": (tiny_bert, padded_batches, "classifier"),
    "llama": (tiny_llama, padded_batches, "lm_head"),
}


def call(model: nn.Module, batch: Any) -> None:
    model(**batch) if isinstance(batch, dict) else model(batch[0] if isinstance(batch, (tuple, list)) else batch)


def positions_read(module: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    """The input of a layer as float64 rows `(groups, positions, inputs)`, padding left out."""
    x = x.double()
    if isinstance(module, nn.Conv2d):
        sides = module._reversed_padding_repeated_twice
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        patches = F.unfold(F.pad(x, sides, mode=mode), module.kernel_size, module.dilation, 0, module.stride)
        return patches.unflatten(1, (module.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)
    if mask is not None and x.shape[:-1] == mask.shape:
        x = x[mask.bool()]
    return x.reshape(1, -1, x.shape[-1])


def naive_scores(
    base: nn.Module, batches: list[Any], head: str, norm: str = "l1", weight_magnitude: bool = True
) -> dict[str, list[list[float]]]:
    """Eqs. 2-6 for every weight of a plain model, in float64."""
    layers = {name: m for name, m in base.named_modules() if isinstance(m, KINDS) and name != head}
    inputs: dict[str, list[Tensor]] = {name: [] for name in layers}
    mask: Tensor | None = None
    handles = [
        module.register_forward_pre_hook(
            lambda module, args, name=name: inputs[name].append(positions_read(module, args[0], mask))
        )
        for name, module in layers.items()
    ]
    with torch.no_grad():
        for batch in batches:
            mask = batch.get("attention_mask") if isinstance(batch, dict) else None
            call(base, batch)
    for handle in handles:
        handle.remove()
    scores = {}
    for name, module in layers.items():
        rows = torch.cat(inputs[name], dim=1)
        activation = rows.abs().mean(1) if norm == "l1" else rows.square().mean(1).sqrt()
        weight = (module.weight.t() if isinstance(module, Conv1D) else module.weight.flatten(1)).detach().double()
        driven = activation.repeat_interleave(weight.shape[0] // activation.shape[0], 0)
        scores[name] = (weight.abs() * driven if weight_magnitude else driven.expand(weight.shape)).tolist()
    return scores


def naive_selection(scores: dict[str, list[list[float]]], k: float, granularity: str) -> dict[str, Rows]:
    entries = {name: min(int(k * len(rows)), len(rows) * len(rows[0])) for name, rows in scores.items()}
    if granularity == "model":
        return naive.by_model(scores, sum(entries.values()))
    choose = naive.by_neuron if granularity == "neuron" else naive.by_layer
    return {name: choose(rows, entries[name]) for name, rows in scores.items()}


def assert_same_selection(
    model: nn.Module, scores: dict[str, list[list[float]]], expected: dict[str, Rows], adapter_name: str = "default"
) -> None:
    """The same entries, but for such whose scores only rounding tells apart."""
    layers = layers_of(model)
    assert set(layers) == set(expected)
    missing, surplus = [], []
    for name, rows in expected.items():
        for i, (wanted, found) in enumerate(zip(rows, selected_columns(layers[name], adapter_name), strict=True)):
            missing += [scores[name][i][column] for column in set(wanted) - set(found)]
            surplus += [scores[name][i][column] for column in set(found) - set(wanted)]
    assert sorted(missing) == pytest.approx(sorted(surplus), rel=1e-5)


def selection_of(model: nn.Module, adapter_name: str = "default") -> dict[str, Rows]:
    return {name: selected_columns(layer, adapter_name) for name, layer in layers_of(model).items()}


def fresh(base: nn.Module, **options: Any) -> Any:
    """A model with an adapter that waits for calibration."""
    if "budget" not in options:
        options.setdefault("per_neuron", 3)
    return get_peft_model(base, FPSConfig(**options))
