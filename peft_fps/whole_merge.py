"""Merging a whole model: everything is checked before the first layer changes."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from peft_fps.adapters import FPSLayer
from peft_fps.quantised_layers import QuantisedLinear, check_writable
from peft_fps.sharded import check_whole


NEGLIGIBLE_LOSS = 0.01
"""Share of the changes that rounding may swallow in a merge before a warning is due."""


@contextmanager
def whole_merge(model: nn.Module, adapter_names: Sequence[str], safe_merge: bool) -> Iterator[Sequence[FPSLayer]]:
    """Check all layers before the first is merged, give them, and say afterwards how much rounding swallowed."""
    check_whole(
        model, "merge", "Merge before the model is sharded, or save the adapter and load it onto a whole base model."
    )
    layers = [module for module in model.modules() if isinstance(module, FPSLayer)]
    known = {name for layer in layers for name in layer.fps_values}
    if unknown := [name for name in adapter_names if name not in known]:
        raise ValueError(f"Cannot merge the adapters {unknown}, expected names among {sorted(known)}.")
    pairs = [(layer, name) for layer in layers for name in adapter_names if name in layer.fps_values]
    check_writable(model, dict.fromkeys(layer for layer, _ in pairs))
    for layer in layers if safe_merge else ():
        layer.check_merge(list(adapter_names))
    for layer, name in pairs:
        layer.structure(name)  # checks the tensors, unless they are the ones last checked
    if not _sums_are_finite([parameter for layer, name in pairs for parameter in layer.adapter_parameters(name)]):
        for layer, name in pairs:
            layer.check_tensors(name)  # a sum may also overflow
    before = {(id(layer), name) for layer in layers for name in layer.merged_adapters}
    yield layers
    records = [
        layer.merge_records[name]
        for layer in layers
        for name in layer.merged_adapters
        if (id(layer), name) not in before
    ]
    changes, lost = sum(record.changes for record in records), sum(record.lost for record in records)
    if lost > NEGLIGIBLE_LOSS * changes:
        kinds = sorted({_kind_of_weight(layer) for layer in layers})
        warnings.warn(
            f"Merging lost {lost:,} of {changes:,} changes ({lost / changes:.1%}): they are below half a unit in the "
            f"last place of the {', '.join(kinds)} weights. Load the base model in float32 to merge all of them, or "
            "keep the adapter unmerged.",
            stacklevel=4,
        )


def _kind_of_weight(layer: FPSLayer) -> str:
    if isinstance(layer, QuantisedLinear):
        return f"quantised ({layer.quantization_backend.backend_name})"
    return str(layer.base_layer.weight.dtype)


def _sums_are_finite(parameters: list[nn.Parameter]) -> bool:
    """Whether the sums of all parameters are finite; a few operations for a whole model."""
    alike: dict[object, list[Tensor]] = {}
    for parameter in parameters:
        alike.setdefault((parameter.device, parameter.dtype), []).append(parameter.detach())
    return all(bool(torch.cat(tensors).sum().isfinite()) for tensors in alike.values())
