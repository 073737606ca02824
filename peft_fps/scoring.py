"""Scores of one layer's weights as an adapter's config asks for them."""

import hashlib
from collections.abc import Callable, Mapping

import torch
from accelerate.utils import align_module_device
from torch import Tensor

from peft_fps.adapters import FPSLayer
from peft_fps.calibration import InputStatistics
from peft_fps.config import FPSConfig
from peft_fps.selection import importance


Statistics = Mapping[str, InputStatistics]
Score = Callable[[int, int], Tensor]


def scorer(layer: FPSLayer, path: str, config: FPSConfig, statistics: Statistics) -> Score:
    """Return a function that scores the rows `first:last` of the layer's weight, `(last - first, inputs)` float32.

    Where statistics are due but missing (not calibrated, or a module that no batch reached), magnitude stands in.

    Args:
        layer: gives the weight.
        path: its module path.
        config: says which importance.
        statistics: input statistics by module path; may be empty.
    """
    if config.importance == "random":
        return random_scorer(layer, path, config.seed)
    activation = statistics[path].typical(config.norm) if path in statistics else None
    equal = 1.0 if path in statistics else _mean_activation(config.norm, statistics)

    def score(first: int, last: int) -> Tensor:
        with align_module_device(layer.base_layer):
            weight = layer.base_layer.weight.detach()
            rows = (weight.t() if layer.transposed else weight.flatten(1))[first:last]
            if config.importance == "magnitude" or activation is None:
                return importance.magnitude(rows) * equal
            groups = torch.arange(first, last) // (layer.shape.neurons // activation.shape[0])
            driven = (activation if activation.shape[0] == 1 else activation[groups]).to(rows.device)
            if config.weight_magnitude:
                return importance.weight_times_activation(rows, driven)
            return importance.activation_alone(rows, driven)

    return score


def random_scorer(layer: FPSLayer, path: str, seed: int) -> Score:
    """As `scorer`, with scores that depend on the seed, the module path and the row alone."""

    def score(first: int, last: int) -> Tensor:
        digest = hashlib.sha256(f"{seed} {path} {first}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        device = next(iter(layer.fps_columns.values())).device
        return importance.random(torch.empty(last - first, layer.shape.inputs, device=device), generator)

    return score


def _mean_activation(norm: str, statistics: Statistics) -> float:
    """What an average input is driven by: keeps magnitude comparable with scores under granularity "model"."""
    if not statistics:
        return 1.0
    return float(sum(reached.typical(norm).mean().cpu() for reached in statistics.values()) / len(statistics))
