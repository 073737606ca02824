"""How unevenly the inputs of modules are read: what share of the entries the most-read inputs hold."""

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributions import Binomial

from peft_fps.selection.entries import ModuleEntries


POINTS = 400
"""Points of a curve that a picture can show."""


def input_counts(module: ModuleEntries) -> Tensor:
    """Return how many neurons read each input, `(inputs,)` int64."""
    return torch.bincount(module.columns.long(), minlength=module.inputs)


def concentration(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return a curve from (0, 0) to (1, 1): share of the inputs, the most-read first, and share of the entries.

    Args:
        counts: readers of each input, `(inputs,)`, of one module or several; one of them at least is not 0.

    Returns:
        Both shares, float64, of at most `POINTS` + 1 points.
    """
    held = torch.cat([counts.new_zeros(1), counts.sort(descending=True).values]).cumsum(0).double()
    places = torch.linspace(0, len(counts), min(POINTS, len(counts)) + 1, dtype=torch.float64).round().long()
    return places / len(counts), held[places] / held[-1]


def chance_concentration(modules: Iterable[ModuleEntries]) -> tuple[Tensor, Tensor]:
    """Return the same curve as it is to be expected if the entries of every module lay at random places.

    An input's readers are then binomially distributed, closely, with the module's neurons as trials.

    Args:
        modules: with one entry at least among them.
    """
    sizes = Counter((module.neurons, module.inputs, module.entries) for module in modules)
    inputs: dict[int, float] = {}
    for (neurons, width, entries), times in sizes.items():
        mean = entries / width
        readers = torch.arange(min(neurons, int(mean + 12 * mean**0.5 + 12)) + 1)
        share = torch.tensor(entries / (neurons * width), dtype=torch.float64)
        weights = times * width * Binomial(neurons, probs=share).log_prob(readers).exp()
        for count, number in zip(readers.tolist(), weights.tolist(), strict=True):
            inputs[count] = inputs.get(count, 0.0) + number
    order = sorted(inputs, reverse=True)
    numbers = torch.tensor([0.0, *(inputs[count] for count in order)], dtype=torch.float64).cumsum(0)
    held = torch.tensor([0.0, *(count * inputs[count] for count in order)], dtype=torch.float64).cumsum(0)
    return numbers / numbers[-1], held / held[-1]
