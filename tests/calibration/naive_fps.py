"""FPS written down a second time."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor, nn

from peft_fps import FPSConfig
from tests.gradients.naive_sums import CONVOLUTIONS, KINDS, TRANSPOSED, matrix, padded_batches
from tests.selection import naive
from tests.support.helpers import (
    image_batches,
    images,
    layers_of,
    selected_columns,
    tiny_bert,
    tiny_codec,
    tiny_conv,
    tiny_gpt2,
    tiny_llama,
    tiny_vit,
    waves,
)


Rows = list[list[int]]


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[Any]], str]] = {
    # model, batches, and the head that is left out
    "vit": (tiny_vit, image_batches, "classifier"),
    "conv": (tiny_conv, lambda: [images(4, seed) for seed in range(3)], "no such head"),
    "codec": (tiny_codec, lambda: [waves(4, seed) for seed in range(3)], "no such head"),
    "gpt2": (tiny_gpt2, padded_batches, "lm_head"),
    "bert": (tiny_bert, padded_batches, "classifier"),
    "llama": (tiny_llama, padded_batches, "lm_head"),
}


def call(model: nn.Module, batch: Any) -> None:
    model(**batch) if isinstance(batch, dict) else model(batch[0] if isinstance(batch, (tuple, list)) else batch)


def positions_read(module: Any, x: Tensor, mask: Tensor | None, output: Tensor) -> Tensor:
    """The input of a layer as float64 rows `(groups, positions, inputs)`, padding left out."""
    x = x.double()
    if isinstance(module, CONVOLUTIONS):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        patches, axes = F.pad(x, module._reversed_padding_repeated_twice, mode=mode), len(module.kernel_size)
        for axis, (kernel, stride, step) in enumerate(
            zip(module.kernel_size, module.stride, module.dilation, strict=True)
        ):
            patches = patches.unfold(2 + axis, step * (kernel - 1) + 1, stride)[..., ::step]
        return by_groups(patches.movedim(1, 1 + axes), module, axes)
    if isinstance(module, TRANSPOSED):
        axes, taps = len(module.kernel_size), []
        for tap in product(*map(range, module.kernel_size)):
            reaches = torch.ones(x.shape[2:], dtype=torch.float64)
            for place in product(*map(range, x.shape[2:])):
                for axis in range(axes):
                    target = place[axis] * module.stride[axis] - module.padding[axis]
                    target += tap[axis] * module.dilation[axis]
                    reaches[place] *= 0 <= target < output.shape[2 + axis]
            taps.append(x * reaches)
        return by_groups(torch.stack(taps, -1).movedim(1, 1 + axes), module, axes)
    if mask is not None and x.shape[:-1] == mask.shape:
        x = x[mask.bool()]
    return x.reshape(1, -1, x.shape[-1])


def by_groups(rows: Tensor, module: Any, axes: int) -> Tensor:
    """From `(batch, *positions, channels, *kernel)` to `(groups, positions, inputs)`."""
    return rows.flatten(0, axes).flatten(1).unflatten(1, (module.groups, -1)).transpose(0, 1)


def naive_scores(
    base: nn.Module, batches: list[Any], head: str, norm: str = "l1", weight_magnitude: bool = True
) -> dict[str, list[list[float]]]:
    """Eqs. 2-6 for every weight of a plain model, in float64."""
    layers = {name: m for name, m in base.named_modules() if isinstance(m, KINDS) and name != head}
    inputs: dict[str, list[Tensor]] = {name: [] for name in layers}
    mask: Tensor | None = None
    handles = [
        module.register_forward_hook(
            lambda module, args, output, name=name: inputs[name].append(positions_read(module, args[0], mask, output))
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
        weight = matrix(module, module.weight.detach()).double()
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
