"""The budget as numbers of entries: how many each targeted module of an adapter gets."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from peft_fps.config import FPSConfig
from peft_fps.layers.fps_layer import FPSLayer
from peft_fps.layers.lookup import entry_layers
from peft_fps.selection import LayerShape, allocate, check_granularity
from peft_fps.selection.budget_allocation import matches
from peft_fps.targets.base_parameters import count_base_parameters


def allocate_entries(
    shapes: Mapping[str, LayerShape],
    biases: int,
    config: FPSConfig,
    base_parameters: int,
    *,
    absent: Collection[str] = (),
) -> dict[str, int]:
    """Return the number of entries of each module, by path, as the config's budget or K says.

    Args:
        shapes: of the weights that are trained, by module path.
        biases: number of elements of all biases of the modules that are trained, norms included. With `bias="none"`
            none of them counts.
        config: of the adapter.
        base_parameters: number of parameters of the base model without its head.
        absent: paths of targeted modules that get nothing, and for which `budget_pattern` may have values.

    Raises:
        ValueError: the budget does not fit.
    """
    biases = 0 if config.bias == "none" else biases
    biases += len(shapes) if config.token_gate is not None else 0  # thresholds, one per module
    patterns = {
        pattern: value
        for pattern, value in config.budget_pattern.items()
        if any(matches(pattern, name) for name in shapes) or not any(matches(pattern, name) for name in absent)
    }
    allocation = allocate(
        shapes,
        biases=biases,
        base_parameters=base_parameters,
        budget=config.budget,
        per_neuron=config.per_neuron,
        budget_pattern=patterns,
    )
    entries = sum(allocation.entries.values())
    check_granularity(config.granularity, shapes, entries, biases=biases, base_parameters=base_parameters)
    return allocation.entries


def entries_of_reached(
    base: nn.Module,
    config: FPSConfig,
    layers: Mapping[str, FPSLayer],
    adapter_name: str,
    reached: Collection[str],
) -> dict[str, int]:
    """Return the number of entries of each module that data has reached, by path. Norms are left out.

    If the adapter holds something in just these modules, they keep their numbers. Else the budget is allocated anew,
    as if the adapter had been made for them alone.

    Args:
        base: base model.
        config: of the adapter.
        layers: all that the adapter targets, by path.
        adapter_name: name of the adapter.
        reached: paths of the modules that data has reached.

    Raises:
        ValueError: no module was reached, or the budget does not fit those that were.
    """
    if not reached:
        raise ValueError(
            f"{next(iter(layers))}: neither it nor any other of the {len(layers)} modules of adapter {adapter_name!r} "
            "was reached during calibration, expected data that the model calls targeted modules with. Check the "
            "data, and that the model calls these modules. Nothing was changed."
        )
    trained = {path: layer for path, layer in layers.items() if path in reached}
    if all(layer.carries(adapter_name) == (path in reached) for path, layer in layers.items()):
        return {path: layer.fps_values[adapter_name].numel() for path, layer in entry_layers(trained).items()}
    shapes = {path: layer.selectable_shape(layer.base_layer) for path, layer in entry_layers(trained).items()}
    biases = sum(layer.neurons for layer in trained.values() if adapter_name in layer.fps_bias)
    parameters = count_base_parameters(base)
    return allocate_entries(shapes, biases, config, parameters, absent=layers.keys() - trained.keys())


def bias_count(base: Any) -> int:
    """Return the number of elements of a base layer's bias, 0 if it has none."""
    bias = getattr(base, "bias", None)
    return 0 if bias is None else bias.numel()
