"""The merge of adapters in all layers of a model, or in none."""

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import TypeVar

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge, onload_layer
from torch import Tensor, nn

from peft_fps.base.sharded import check_whole, gathered, has_shards, reshard
from peft_fps.layers.fps_layer import FPSLayer
from peft_fps.layers.layer_merge import Undone, check_distinct
from peft_fps.layers.merge_record import MergeRecord
from peft_fps.layers.quantised_linear import QuantisedLinear, check_writable


Result = TypeVar("Result")

NEGLIGIBLE_LOSS = 0.01
"""Share of the changes that a merge may lose to rounding without a warning."""


def merge_whole(model: nn.Module, adapter_names: Sequence[str] | None, safe_merge: bool) -> None:
    """Merge adapters in all layers, and warn if rounding loses many of the changes.

    The tensors of all adapters are checked before the first layer is merged. A layer may still fail: memory runs out,
    or with `safe_merge` a sum overflows. Then the layers before it are unmerged, bit for bit.

    The layers of a model that FSDP2 has sharded are gathered one by one. All processes call this function together.

    Args:
        model: has the adapters.
        adapter_names: adapters to merge, in order. None means those that are active in each layer.
        safe_merge: refuse a merge that would write NaN or infinity into a layer.

    Raises:
        TypeError, ValueError: the names are not a list of known and distinct adapters, or a layer cannot be merged.
            Nothing was changed then.
    """
    remedy = "Merge before the model is sharded, or save the adapter and load it onto a whole base model."
    reshard(model)
    check_whole(model, "merge", remedy, allow_fsdp=True)
    layers = [module for module in model.modules() if isinstance(module, FPSLayer)]
    check_before_merge(model, layers, adapter_names, safe_merge)
    before = [len(layer.merged_adapters) for layer in layers]
    try:
        for layer in layers:
            _at_hand(layer, partial(layer.merge_checked, _unmerged(layer, adapter_names), safe_merge))
        _warn_of_losses(layers, before)
    except BaseException:
        for layer, count in zip(layers, before, strict=True):
            _at_hand(layer, partial(layer.take_out, len(layer.merged_adapters) - count))
        raise


def _unmerged(layer: FPSLayer, adapter_names: Sequence[str] | None) -> list[str]:
    """Return which adapters a layer has and is still to merge; PEFT warns of those that are merged."""
    if adapter_names is not None and not adapter_names:
        return []
    names = None if adapter_names is None else list(adapter_names)
    return [name for name in check_adapters_to_merge(layer, names) if name in layer.fps_state]


def unmerge_whole(model: nn.Module, *, others_restored: bool = False) -> None:
    """Put the originals back in all layers. If one fails, those before it are merged again, bit for bit.

    Args:
        model: has the adapters.
        others_restored: whether what others have changed since the merge is put back by the caller; else a warning
            tells of it.
    """
    reshard(model)
    merged: list[FPSLayer] = [module for module in model.modules() if isinstance(module, FPSLayer) and module.merged]
    undone: list[tuple[FPSLayer, list[Undone]]] = []
    try:
        for layer in merged:
            undone.append((layer, _at_hand(layer, partial(layer.take_out, len(layer.merged_adapters)))))
    except BaseException:
        for layer, taken in undone:
            _at_hand(layer, partial(layer.put_back, taken))
        raise
    for layer, taken in undone if not others_restored else ():
        layer.warn_of_changes(taken)


def check_unmerged(layers: Mapping[str, FPSLayer], adapter_name: str, purpose: str) -> None:
    """Raise ValueError if an adapter is merged that is to get other tensors.

    Args:
        layers: of the adapter, by path.
        adapter_name: its name.
        purpose: what an unmerged adapter is expected for, as a verb.
    """
    for path, layer in layers.items():
        if adapter_name in layer.merged_adapters:
            raise ValueError(
                f"{path}: adapter {adapter_name!r} is merged into the base weights, expected an unmerged adapter to "
                f"{purpose}: the model would compute with what was merged, and save what is new. Call "
                "model.unmerge_adapter() first. Nothing was changed."
            )


def check_before_merge(
    model: nn.Module, layers: Sequence[FPSLayer], adapter_names: Sequence[str] | None, safe_merge: bool
) -> None:
    """Check that the names are those of adapters whose tensors are valid, in layers that can be written to.

    Args:
        model: has the adapters.
        layers: its FPS layers.
        adapter_names: adapters to merge, in order. None means those that are active in each layer.
        safe_merge: refuse an adapter with NaN or infinity.

    Raises:
        TypeError, ValueError: they are not.
    """
    if isinstance(adapter_names, str):
        raise TypeError(f"adapter_names is {adapter_names!r}, expected a list of names.")
    check_distinct(adapter_names or ())
    known = {name for layer in layers for name in layer.fps_state}
    if unknown := [name for name in adapter_names or () if name not in known]:
        raise ValueError(f"Cannot merge the adapters {unknown}, expected names among {sorted(known)}.")
    pairs = [
        (layer, name)
        for layer in layers
        for name in (layer.active_adapters if adapter_names is None else adapter_names)
        if name in layer.fps_state
    ]
    for layer, name in pairs:
        layer.check_mergeable(name)
    check_writable(model, dict.fromkeys(layer for layer, _ in pairs))
    for layer, name in pairs:
        if has_shards(layer):
            with gathered(layer.modules()):
                layer.check_finite(name) if safe_merge else layer.check_tensors(name)
    pairs = [(layer, name) for layer, name in pairs if not has_shards(layer)]
    for layer, name in pairs if safe_merge else ():
        layer.check_finite(name)
    for layer, name in pairs:
        layer.prepare(name)  # checks the tensors, unless they are the ones last checked
    if not _sums_are_finite([parameter for layer, name in pairs for parameter in layer.adapter_parameters(name)]):
        for layer, name in pairs:
            layer.check_tensors(name)  # a sum may also overflow


def _at_hand(layer: FPSLayer, act: Callable[[], Result]) -> Result:
    """Run `act` while the weight of the layer is at hand if accelerate offloads it, or if it is sharded.

    What `act` raises is raised when the weight has been put away again.
    """
    if has_shards(layer):
        with gathered(layer.modules(), keep=True):
            return act()
    if not (hasattr(layer, "_hf_hook") or hasattr(layer.base_layer, "_hf_hook")):
        return act()
    found: list[Result] = []
    failure: BaseException | None = None
    with onload_layer(layer):
        try:
            found.append(act())
        except BaseException as error:  # PEFT would leave the weight where it has brought it
            failure = error
    if failure is not None:
        raise failure
    return found[0]


def _warn_of_losses(layers: Sequence[FPSLayer], before: Sequence[int]) -> None:
    """Warn if rounding lost many changes in merges after the first `before` of each layer."""
    records = [
        layer.merge_records[name]
        for layer, count in zip(layers, before, strict=True)
        for name in layer.merged_adapters[count:]
    ]
    kinds = {kind_of_weight(layer) for layer in layers}
    if message := loss_message(records, kinds):
        warnings.warn(message, stacklevel=4)


def loss_message(records: Iterable[MergeRecord], kinds: Collection[str]) -> str | None:
    """Return what to warn of if rounding lost many of the changes of a merge, else None.

    Args:
        records: of the merges of all layers.
        kinds: of their weights, as `kind_of_weight` names them.
    """
    counts = [(record.changes, record.lost) for record in records]
    changes, lost = sum(changes for changes, _ in counts), sum(lost for _, lost in counts)
    if lost <= NEGLIGIBLE_LOSS * changes:
        return None
    return (
        f"Merging lost {lost:,} of {changes:,} changes ({lost / changes:.1%}): they are below half a unit in the last "
        f"place of the {', '.join(sorted(kinds))} weights. Load the base model in float32 to merge all of them, or "
        "keep the adapter unmerged."
    )


def kind_of_weight(layer: FPSLayer) -> str:
    """Return the dtype of a layer's weight, or how it is quantised, for a message."""
    if isinstance(layer, QuantisedLinear):
        return f"quantised ({layer.quantization_backend.backend_name})"
    return str(layer.base_layer.weight.dtype)


def _sums_are_finite(parameters: list[nn.Parameter]) -> bool:
    """Return whether the sums of all parameters are finite, in a few operations for a whole model."""
    alike: dict[object, list[Tensor]] = {}
    for parameter in parameters:
        alike.setdefault((parameter.device, parameter.dtype), []).append(parameter.detach())
    return all(bool(torch.cat(tensors).sum().isfinite()) for tensors in alike.values())
