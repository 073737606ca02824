"""Ways to choose entries that are tried against FPS with biases; none is part of the adapter's config."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peft_fps.benchmarks.transfer.granularity_mix import select_one_each
from peft_fps.benchmarks.transfer.matrix_scores import expected_gradient, low_rank_magnitude, relative_importance
from peft_fps.benchmarks.transfer.typical_sizes import Sizes, gather_sizes
from peft_fps.benchmarks.transfer.uneven_budget import in_proportion, shares_by_outliers, shares_by_tails
from peft_fps.importance.activation import weight_times_activation
from peft_fps.layers.lookup import base_model, entry_layers, fps_layers
from peft_fps.saved_selection import Selection
from peft_fps.selection import Candidate
from peft_fps.selection.candidate import Selected
from peft_fps.selection.entries import ModuleEntries
from peft_fps.selection.own_scores import checked_scores
from peft_fps.selection.select import select_by_layer, select_by_neuron


def _fps(weight: Tensor, sizes: Sizes) -> Tensor:
    """Return FPS's score."""
    return weight_times_activation(weight, sizes.mean_input)


@dataclass(frozen=True)
class Choice:
    """A way to choose entries; what it does not name is FPS's.

    Attributes:
        score: from a weight `(neurons, inputs)` and the sizes at its layer to scores of the weight's shape.
        pick: takes a layer with its scores and its number of entries, and selects.
        shares: from all weights and all scores, by path, to numbers that the layers' entries per neuron are in
            proportion to; None keeps each layer's number.
        backward: whether the score needs gradients at outputs.
    """

    score: Callable[[Tensor, Sizes], Tensor] = _fps
    pick: Callable[[Candidate], Selected] = select_by_neuron
    shares: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], dict[str, float]] | None = None
    backward: bool = False


def _expected_gradient(weight: Tensor, sizes: Sizes) -> Tensor:
    return expected_gradient(weight, sizes.mean_input, sizes.mean_gradient)


CHOICES: dict[str, Choice] = {
    "neuron-then-layer": Choice(pick=select_one_each),
    "lift": Choice(lambda weight, sizes: low_rank_magnitude(weight)),
    "lift-activation": Choice(lambda weight, sizes: low_rank_magnitude(weight) * sizes.mean_input),
    "ria": Choice(lambda weight, sizes: relative_importance(weight, sizes.root_mean_square)),
    "owl": Choice(shares=shares_by_outliers),
    "alpha": Choice(shares=shares_by_tails),
    "output-gradient": Choice(_expected_gradient, select_one_each, backward=True),
    "output-gradient-layer": Choice(_expected_gradient, select_by_layer, backward=True),
}
"""Ways to choose by name. `owl` and `alpha` spread the budget unevenly, with FPS's score inside a layer."""


def choose(model: Any, choice: str, data: Iterable[Mapping[str, Any]]) -> None:
    """Give an FPS adapter other entries, as many in all as it has.

    Args:
        model: a `PeftModel` with an FPS adapter that is not trained.
        choice: key of `CHOICES`.
        data: batches of `pixel_values` and `labels`.
    """
    way, before = CHOICES[choice], Selection.of(model)
    sizes = gather_sizes(model, data, way.backward)
    layers = entry_layers(fps_layers(base_model(model)))
    shapes = {path: layers[path].shape for path in before.modules}
    with torch.no_grad():
        weights = {path: layers[path].weight_rows(0, shape.neurons) for path, shape in shapes.items()}
        scores = {path: checked_scores(path, way.score(weights[path], sizes[path]), shapes[path]) for path in shapes}
        entries = {path: module.entries for path, module in before.modules.items()}
        if way.shares is not None:
            entries = in_proportion(shapes, way.shares(weights, scores), sum(entries.values()))
        picked = {
            path: way.pick(Candidate(shape, entries[path], _rows(scores[path]))) for path, shape in shapes.items()
        }
    modules = {path: ModuleEntries(*picked[path], shape.inputs) for path, shape in shapes.items()}
    method = {"importance": choice, "order": "top", "base_fingerprint": before.method["base_fingerprint"]}
    Selection(modules, method).apply(model)


def _rows(scores: Tensor) -> Callable[[int, int], Tensor]:
    return lambda first, last: scores[first:last]
