"""The plan of an adapter before the model is changed: how many entries each module gets, and whether they fit."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from peft_fps.base.head import Head
from peft_fps.base.opening import module_at
from peft_fps.base.quantisation import BaseWeight, base_weight
from peft_fps.base.sharded import is_partitioned, is_sharded
from peft_fps.checkpoint import check_fingerprint, fingerprint
from peft_fps.checkpoint.record import SavedSizes
from peft_fps.config import FPSConfig
from peft_fps.layers.fps_layer import FPSLayer
from peft_fps.layers.layer_types import entry_layer_class
from peft_fps.layers.merge_record import unmerged_copy
from peft_fps.lifecycle.entry_allocation import allocate_entries, bias_count
from peft_fps.selection import LayerShape
from peft_fps.targets.base_parameters import base_parameters, count_base_parameters
from peft_fps.targets.inert_biases import inert_biases
from peft_fps.targets.target_checks import check_named_modules, check_target, check_untied


@dataclass(frozen=True)
class Plan:
    """What injecting an adapter needs to know of the model.

    Attributes:
        entries: number of entries of each targeted module, by path.
        base_fingerprint: fingerprint of the base weights; None if they cannot be read.
        base_parameters: number of parameters of the base model without its output head.
        inert_biases: paths of the modules whose bias a new adapter does not train, since it cannot change the output.
    """

    entries: dict[str, int]
    base_fingerprint: dict[str, str] | None
    base_parameters: int
    inert_biases: frozenset[str] = frozenset()


def plan(model: nn.Module, config: FPSConfig, head: Head, names: list[str], saved_names: Mapping[str, str]) -> Plan:
    """Check the targeted modules, and return what injecting the adapter needs to know of them.

    Args:
        model: base model, with or without other adapters.
        config: config of the new adapter. A record in it is compared with the model.
        head: of the model.
        names: paths of the modules to adapt.
        saved_names: names of these modules in the record, where they differ.

    Raises:
        ValueError: a module cannot be adapted, the budget does not fit, or the config belongs to another model.
    """
    if config.record is None:
        check_named_modules(model, config)
    norms = config.bias == "with_norms"
    chosen = config.filled_in.target_modules or ()
    bases = {name: check_target(model, name, norms, chosen=name in chosen) for name in names}
    check_untied(model, names)
    kinds = {name: kind for name, base in bases.items() if (kind := entry_layer_class(base))}
    weights = {name: _base_weight(model, name) for name in names}
    base_fingerprint = fingerprint(weights)
    parameters, inert = count_base_parameters(model, head), _inert_biases(model, config, bases)
    if config.record is not None:
        shapes = {name: kind.shape_of(bases[name]) for name, kind in kinds.items()}
        sizes_of = {name: _sizes(shapes.get(name), base) for name, base in bases.items()}
        _check_allocation(config.record.allocation, sizes_of)
        renamed = {saved_names.get(name, name): weight for name, weight in weights.items()}
        as_saved = base_fingerprint if renamed == weights else fingerprint(renamed)
        check_fingerprint(config.record.base_fingerprint, as_saved, config.check_base)
        entries = {name: sizes.entries for name, sizes in config.record.allocation.items()}
        return Plan(entries, base_fingerprint, parameters, inert)
    if not names:
        return Plan({}, base_fingerprint, parameters)  # PEFT says which targets were not found
    biases = sum(bias_count(base) for name, base in bases.items() if name not in inert)
    shapes = {name: kind.selectable_shape(bases[name]) for name, kind in kinds.items()}
    entries = allocate_entries(shapes, biases, config, parameters)
    return Plan(entries, base_fingerprint, parameters, inert)


def _inert_biases(model: nn.Module, config: FPSConfig, bases: Mapping[str, Any]) -> frozenset[str]:
    """Return the paths of the modules of which the adapter needs no bias delta, although its config asks for biases.

    A gate lets a bias delta count at some positions alone, so at some keys, and no bias is inert.
    """
    if config.bias == "none" or config.token_gate is not None:
        return frozenset()
    return inert_biases(model, [name for name, base in bases.items() if bias_count(base)])


def _sizes(shape: LayerShape | None, base: Any) -> tuple[int, int]:
    """Return a module's neurons and inputs as a saved config holds them; a norm, which has no shape, has 0 inputs."""
    return (bias_count(base), 0) if shape is None else (shape.neurons, shape.inputs)


def _check_allocation(allocation: SavedSizes, sizes_of: Mapping[str, tuple[int, int]]) -> None:
    """Raise ValueError unless a saved allocation describes exactly these modules, given by neurons and inputs."""
    advice = (
        "The config was made for another model; load it onto that one, or start afresh from an FPSConfig without "
        "a record."
    )
    for name, sizes in allocation.items():
        if name not in sizes_of:
            raise ValueError(f"{name}: named in the adapter's config, but the model has no such target. {advice}")
        neurons, inputs = sizes_of[name]
        if (neurons, inputs) != (sizes.neurons, sizes.inputs):
            raise ValueError(
                f"{name}: found {neurons} neurons with {inputs} inputs, expected {sizes.neurons} with "
                f"{sizes.inputs} as in the adapter's config. {advice}"
            )


def fingerprint_of(model: nn.Module, names: Iterable[str]) -> dict[str, str] | None:
    """Return the fingerprint of the base model's weights at `names`; None where they are not at hand as a whole."""
    weights = {name: _base_weight(model, name) for name in names}
    sharded = any(is_sharded(each) or is_partitioned(each) for _, each in base_parameters(model))
    return None if sharded else fingerprint(weights)


def _base_weight(model: nn.Module, name: str) -> BaseWeight:
    """Return how to read a module's weight without what is merged into it. It is dequantised only when it is read."""
    layer: Any = module_at(model, name)
    base = layer
    if isinstance(layer, FPSLayer):
        records = [layer.merge_records[adapter] for adapter in reversed(layer.merged_adapters)]
        base = unmerged_copy(layer.base_layer, records) if records else layer.base_layer
    return base_weight(base)
