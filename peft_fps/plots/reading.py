"""The uneven use of the inputs of modules: the share of entries that read the most-read inputs."""

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributions import Binomial

from peft_fps.selection.entries import ModuleEntries


POINTS = 400
"""Number of points of a curve, as many as a picture can show."""


def input_counts(module: ModuleEntries) -> Tensor:
    """Return the number of neurons that read each input, `(inputs,)` int64."""
    return torch.bincount(module.columns.long(), minlength=module.inputs)


def concentration(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return a curve from (0, 0) to (1, 1) of the share of entries that read the most-read inputs.

    Args:
        counts: number of readers of each input of one module or several, `(inputs,)`. At least one is not 0.

    Returns:
        Share of the inputs, the most-read first, and share of the entries that read them. Both are float64 with at
        most `POINTS` + 1 points.
    """
    entries = torch.cat([counts.new_zeros(1), counts.sort(descending=True).values]).cumsum(0).double()
    points = torch.linspace(0, len(counts), min(POINTS, len(counts)) + 1, dtype=torch.float64).round().long()
    return points / len(counts), entries[points] / entries[-1]


def chance_concentration(modules: Iterable[ModuleEntries]) -> tuple[Tensor, Tensor]:
    """Return the curve of `concentration` that is expected for entries at random positions in every module.

    The number of readers of an input has then approximately a binomial distribution with a trial per neuron.

    Args:
        modules: modules that give sizes and numbers of entries. At least one has an entry.

    Returns:
        Share of the inputs and share of the entries, float64.
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
    read = torch.tensor([0.0, *(count * inputs[count] for count in order)], dtype=torch.float64).cumsum(0)
    return numbers / numbers[-1], read / read[-1]
