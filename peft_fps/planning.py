"""Before a model is changed: which modules an adapter will have, how many entries each, and whether all of it fits."""

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from peft_fps.adapters import FPSLayer
from peft_fps.checkpoint import check_fingerprint, fingerprint
from peft_fps.config import FPSConfig
from peft_fps.layers import layer_shape
from peft_fps.merging import restored_tensors
from peft_fps.selection import LayerShape, allocate
from peft_fps.targets import check_target, check_untied, count_base_parameters


def plan(model: nn.Module, config: FPSConfig, names: list[str]) -> None:
    """Check the targeted modules and complete the config with their sizes and the base model's fingerprint.

    Args:
        model: base model, with or without other adapters.
        config: of the new adapter; `allocation` and `base_fingerprint` are compared if present, else filled in.
        names: modules to adapt.

    Raises:
        ValueError: a module cannot be adapted, the budget does not fit, or the config belongs to another model.
    """
    bases = {name: check_target(model, name) for name in names}
    check_untied(model, names)
    shapes = {name: layer_shape(base) for name, base in bases.items()}
    if config.from_file:
        _check_allocation(config.allocation or {}, shapes)
    elif names:
        trained = {name: replace(s, bias=s.bias and config.bias == "all") for name, s in shapes.items()}
        entries = allocate(
            trained,
            base_parameters=count_base_parameters(model),
            budget=config.budget,
            per_neuron=config.per_neuron,
            budget_pattern=config.budget_pattern,
        ).entries
        sizes = {name: (shape.neurons, shape.inputs, entries[name]) for name, shape in shapes.items()}
        config.allocation = {
            n: dict(zip(("neurons", "inputs", "entries"), size, strict=True)) for n, size in sizes.items()
        }
    found = fingerprint({name: _unmerged_weight(model, name) for name in names})
    if config.from_file:
        check_fingerprint(config.base_fingerprint, found, config.check_base)
    config.base_fingerprint = found


def _check_allocation(allocation: Mapping[str, Mapping[str, int]], shapes: Mapping[str, LayerShape]) -> None:
    """Raise ValueError unless a saved allocation describes exactly these modules."""
    advice = (
        "The config was made for another model; load it onto that one, or start afresh from an FPSConfig without "
        "allocation."
    )
    for name, sizes in allocation.items():
        if name not in shapes:
            raise ValueError(f"{name}: named in the adapter's config, but the model has no such target. {advice}")
        found = (shapes[name].neurons, shapes[name].inputs)
        if found != (sizes["neurons"], sizes["inputs"]):
            raise ValueError(
                f"{name}: found {found[0]} neurons with {found[1]} inputs, expected {sizes['neurons']} with "
                f"{sizes['inputs']} as in the adapter's config. {advice}"
            )


def _unmerged_weight(model: nn.Module, name: str):  # type: ignore[no-untyped-def]
    layer = model.get_submodule(name)
    if not isinstance(layer, FPSLayer):
        return layer.weight
    if not layer.merged:
        return layer.base_layer.weight
    records = [layer.merge_records[adapter] for adapter in reversed(layer.merged_adapters)]
    return restored_tensors(layer.base_layer, records)["weight"]
