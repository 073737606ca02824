"""From a budget to the number of entries of every layer, exact to the entry."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class LayerShape:
    """Shape of a layer's weight seen as a matrix.

    Attributes:
        neurons: rows, the outputs of the layer.
        inputs: columns, the fan-in of a neuron, at least 1.
    """

    neurons: int
    inputs: int

    @property
    def weights(self) -> int:
        """Elements of the weight."""
        return self.neurons * self.inputs


@dataclass(frozen=True)
class Allocation:
    """Result of `allocate`.

    Attributes:
        entries: number of entries of each layer, in the order given.
        biases: bias deltas, as they were given.
        limit: most parameters to train; None without a budget.
    """

    entries: dict[str, int]
    biases: int
    limit: int | None

    @property
    def trained(self) -> int:
        """Selected entries and bias deltas together."""
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
    `floor(budget * base_parameters)`. A neuron with a fan-in below K gets its fan-in, and the others share the rest.
    Every layer gets `floor(K * neurons)`, so the budget is used up to less than one entry per layer. `budget=0` is
    BitFit: no entries, and the biases do not count.

    Args:
        layers: shapes of the targeted weights by module path.
        biases: number of bias deltas that are trained beside the entries, those of normalisations included.
        base_parameters: parameters of the base model without the output head.
        budget: largest share of `base_parameters` to train; exactly one of `budget` and `per_neuron` is given.
        per_neuron: K itself, not necessarily whole; above a fan-in it means the fan-in.
        budget_pattern: module path or regular expression (as PEFT's `rank_pattern`) to that layer's own value: its K
            with `per_neuron`, the share of its weights with `budget`. The other layers share what is left.

    Raises:
        ValueError: the biases or the pattern's layers alone exceed the budget, a pattern matches no layer, or nothing
            would be trained.
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
            f"selects no entry of {len(layers)} targeted modules and no bias is trained. Raise it, or use bias='all'."
        )
    return result


def _match_patterns(layers: Mapping[str, LayerShape], patterns: Mapping[str, float]) -> dict[str, float]:
    fixed: dict[str, float] = {}
    # the longest first, then by name: files do not keep the order of keys
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
    """Whether a key of `budget_pattern`, a module path, its end or a regular expression, is about a module."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _common_k(layers: Mapping[str, LayerShape], available: int) -> Fraction:
    """Largest K with `sum(neurons * min(K, inputs)) <= available`: fill the layers like connected vessels."""
    neurons = sum(layer.neurons for layer in layers.values())
    rest = Fraction(available)
    for layer in sorted(layers.values(), key=lambda layer: layer.inputs):
        if rest >= neurons * layer.inputs:  # this fan-in is below the common level, so the layer is full
            rest -= layer.weights
            neurons -= layer.neurons
    return rest / neurons if neurons else Fraction(max((layer.inputs for layer in layers.values()), default=0))


def _entries(layer: LayerShape, k: Fraction) -> int:
    return int(layer.neurons * min(k, Fraction(layer.inputs)))


def exact(number: float) -> Fraction:
    """The decimal number that the user wrote, not its nearest binary fraction: 0.29 of 100 parameters are 29."""
    return Fraction(str(number))


def round_up(part: int, whole: int) -> float:
    """Smallest share with two significant digits whose floor still holds `part` of `whole`."""
    share = Fraction(part, whole)
    unit = Fraction(1)
    while share < unit * 10:
        unit /= 10
    return float(-(-share // unit) * unit)
