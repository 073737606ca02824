"""Turn a budget into the number of entries of every layer, exact to the entry."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class LayerShape:
    """Shape of a layer's weight seen as a matrix `(neurons, inputs)`.

    Attributes:
        neurons: rows, the outputs of the layer.
        inputs: columns, the fan-in of a neuron. At least 1.
    """

    neurons: int
    inputs: int

    @property
    def weights(self) -> int:
        """Number of elements of the weight."""
        return self.neurons * self.inputs


@dataclass(frozen=True)
class Allocation:
    """How many parameters each layer may train; `allocate` returns it.

    Attributes:
        entries: number of entries of each layer by module path, in the order of the layers.
        biases: number of bias deltas.
        limit: largest number of parameters to train. None without a budget.
    """

    entries: dict[str, int]
    biases: int
    limit: int | None

    @property
    def trained(self) -> int:
        """Number of selected entries and bias deltas together."""
        return sum(self.entries.values()) + self.biases


def allocate(
    layers: Mapping[str, LayerShape],
    *,
    biases: int,
    base_parameters: int,
    budget: float | None,
    per_neuron: float | None,
    budget_pattern: Mapping[str, float] | None = None,
) -> Allocation:
    """Distribute a budget over layers so that every neuron gets the same number of entries, K.

    With `budget`, K is the largest number for which the entries of all layers and the bias deltas stay within
    `floor(budget * base_parameters)`. A neuron with a fan-in below K gets its fan-in, and the other neurons share the
    rest. Every layer gets `floor(K * neurons)` entries, so that less than one entry per layer is left of the budget.
    `budget=0` is BitFit: there are no entries, and biases do not count.

    Args:
        layers: shapes of the targeted weights by module path.
        biases: number of bias deltas that are trained beside the entries, those of normalisations included.
        base_parameters: number of parameters of the base model without the output head.
        budget: largest share of `base_parameters` to train. Exactly one of `budget` and `per_neuron` is given.
        per_neuron: K. It may be a fraction. Above a fan-in it means the fan-in.
        budget_pattern: values of single layers, by module path or regular expression as in PEFT's `rank_pattern`. A
            value is the layer's K with `per_neuron`, and the share of its weights with `budget`. The other layers
            share the rest of the budget.

    Raises:
        ValueError: the biases or the pattern's layers alone exceed the budget, a pattern matches no layer, or there is
            neither an entry nor a bias to train.
    """
    assert (budget is None) != (per_neuron is None)
    fixed = _match_patterns(layers, budget_pattern or {})

    limit = None
    if budget is None:
        assert per_neuron is not None
        k = {name: exact(fixed.get(name, per_neuron)) for name in layers}
    else:
        k = {name: exact(share) * layers[name].inputs for name, share in fixed.items()}
        limit = int(exact(budget) * base_parameters) if budget else biases
        reserved = biases + sum(_entries(layers[name], k[name]) for name in fixed)
        if biases > limit:
            raise ValueError(
                f"budget={budget} allows {limit:,} of {base_parameters:,} base parameters, but the biases of the "
                f"targeted modules alone are {biases:,}. Raise the budget to at least "
                f"{round_up(biases, base_parameters):.2g}, or leave biases out with bias='none'."
            )
        if reserved > limit:
            raise ValueError(
                f"budget={budget} allows {limit:,} of {base_parameters:,} base parameters, but the biases and the "
                f"modules matched by budget_pattern take {reserved:,}. Raise the budget or lower the pattern's shares."
            )
        free = {name: layer for name, layer in layers.items() if name not in fixed}
        common = _common_k(free, limit - reserved)
        k.update(dict.fromkeys(free, common))

    entries = {name: _entries(layer, k[name]) for name, layer in layers.items()}
    assert all(entries[name] <= layer.weights for name, layer in layers.items())
    result = Allocation(entries, biases, limit)
    if result.trained == 0:
        raise ValueError(
            f"Nothing would be trained: {f'budget={budget}' if per_neuron is None else f'per_neuron={per_neuron}'} "
            f"selects no entry of {len(layers)} targeted modules and no bias is trained (biases of keys that softmax "
            "cancels are left out). Raise it, or use bias='all'."
        )
    return result


def _match_patterns(layers: Mapping[str, LayerShape], patterns: Mapping[str, float]) -> dict[str, float]:
    """Return the value of each layer that a key of `budget_pattern` matches; the longest key wins.

    Raises:
        ValueError: a key matches no layer.
    """
    fixed: dict[str, float] = {}
    # sorted by length and then by name, because files do not keep the order of keys
    for pattern, value in sorted(patterns.items(), key=lambda item: (-len(item[0]), item[0])):
        matched = [name for name in layers if matches(pattern, name)]
        if not matched:
            raise ValueError(
                f"budget_pattern key {pattern!r} matches none of the {len(layers)} targeted modules, such as "
                f"{next(iter(layers), None)!r}. Give a module's path, its end, or a regular expression for it."
            )
        fixed.update((name, value) for name in matched if name not in fixed)
    return fixed


def matches(pattern: str, name: str) -> bool:
    """Whether a key of `budget_pattern` matches a module.

    Args:
        pattern: a module path, the end of one, or a regular expression for either.
        name: module path.
    """
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _common_k(layers: Mapping[str, LayerShape], available: int) -> Fraction:
    """Return the largest K with `sum(neurons * min(K, inputs)) <= available`, by water-filling.

    Args:
        layers: shapes by name.
        available: number of entries of all layers together.
    """
    neurons = sum(layer.neurons for layer in layers.values())
    rest = Fraction(available)
    for layer in sorted(layers.values(), key=lambda layer: layer.inputs):
        if rest >= neurons * layer.inputs:  # the fan-in is at most K, so every weight of the layer is selected
            rest -= layer.weights
            neurons -= layer.neurons
    return rest / neurons if neurons else Fraction(max((layer.inputs for layer in layers.values()), default=0))


def _entries(layer: LayerShape, k: Fraction) -> int:
    """Return the number of entries of a layer whose neurons get K entries on average, at most their fan-in."""
    return int(layer.neurons * min(k, Fraction(layer.inputs)))


def exact(number: float) -> Fraction:
    """Return the decimal number that the user wrote instead of its nearest binary fraction.

    So 0.29 of 100 parameters are 29, where floating point gives 28.
    """
    return Fraction(str(number))


def round_up(part: int, total: int) -> float:
    """Return the smallest `share` of two significant digits with `floor(share * total) >= part`."""
    share = Fraction(part, total)
    unit = Fraction(1)
    while share < unit * 10:
        unit /= 10
    return float(-(-share // unit) * unit)
