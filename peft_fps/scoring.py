"""Scores of one layer's weights as an adapter's config asks for them."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from peft_fps.adapters import FPSLayer
from peft_fps.calibration import InputStatistics
from peft_fps.config import FPSConfig
from peft_fps.gradients import Accumulator
from peft_fps.selection import importance


Evidence = Mapping[str, InputStatistics | Accumulator]
"""What the data said, by module path: statistics of inputs, or sums of gradients or changes."""

Score = Callable[[int, int], Tensor]

UNREACHED = 1e-30
"""Factor by which modules without gradients come last where modules are compared."""

STRIPE = 64
"""Rows that a random score is drawn for at once."""


def scorer(layer: FPSLayer, path: str, config: FPSConfig, evidence: Evidence) -> Score:
    """Return a function that scores the rows `first:last` of the layer's weight, `(last - first, inputs)` float32.

    Where data is due but missing (not calibrated, or a module that no batch reached), magnitude stands in.

    Args:
        layer: gives the weight.
        path: its module path.
        config: says which importance.
        evidence: from the data; may be empty.
    """
    if config.importance == "random":
        return random_scorer(layer, path, config.seed)
    found = evidence.get(path)
    if isinstance(found, InputStatistics):
        return _activation_scorer(layer, config, found)
    if found is None or config.importance == "magnitude":
        equal = _stand_in(config, evidence)
        return lambda first, last: importance.magnitude(weight_rows(layer, first, last)) * equal
    return lambda first, last: importance.magnitude(found.rows(first, last))


def weight_rows(layer: FPSLayer, first: int, last: int) -> Tensor:
    """Return the rows `first:last` of the base weight seen as `(neurons, inputs)`."""
    with _brought(layer):
        return layer.weight_rows(first, last)


@contextmanager
def _brought(layer: FPSLayer) -> Iterator[None]:
    """Have a weight that accelerate offloads at hand, as a call of the layer would."""
    base = layer.base_layer
    hook = getattr(base, "_hf_hook", None)
    if hook is None or layer.weight_tensor.device.type != "meta":
        yield
        return
    try:
        hook.pre_forward(base)
        yield
    finally:
        hook.post_forward(base, None)


def random_scorer(layer: FPSLayer, path: str, seed: int) -> Score:
    """As `scorer`, with scores that depend on the seed, the module path and the row alone."""

    def score(first: int, last: int) -> Tensor:
        begin = first // STRIPE * STRIPE
        stripes = [_stripe(seed, path, row, layer.shape.inputs) for row in range(begin, last, STRIPE)]
        device = next(iter(layer.fps_columns.values())).device
        return torch.cat(stripes)[first - begin : last - begin].to(device)

    return score


def _stripe(seed: int, path: str, row: int, inputs: int) -> Tensor:
    digest = hashlib.sha256(f"{seed} {path} {row}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return importance.random(torch.empty(STRIPE, inputs), generator)


def _activation_scorer(layer: FPSLayer, config: FPSConfig, statistics: InputStatistics) -> Score:
    activation = statistics.typical(config.norm)

    def score(first: int, last: int) -> Tensor:
        rows = weight_rows(layer, first, last)
        groups = torch.arange(first, last) // (layer.shape.neurons // activation.shape[0])
        driven = (activation if activation.shape[0] == 1 else activation[groups]).to(rows.device)
        if config.weight_magnitude:
            return importance.weight_times_activation(rows, driven)
        return importance.activation_alone(rows, driven)

    return score


def _stand_in(config: FPSConfig, evidence: Evidence) -> float:
    """Factor that keeps magnitude comparable with the scores of other modules under granularity "model"."""
    reached = [item for item in evidence.values() if isinstance(item, InputStatistics)]
    if reached:  # what an average input is driven by
        return float(sum(item.typical(config.norm).mean().cpu() for item in reached) / len(reached))
    return UNREACHED if evidence else 1.0
