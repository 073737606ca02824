"""Merging where FPS and LoRA adapters share a model: all of it or nothing, and undone bit for bit.

PEFT unmerges LoRA by subtracting B A, which does not give the bits back. So the weights of layers with merged LoRA
adapters are kept, as dense copies, until they are unmerged.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from peft_fps.config import FPSConfig
from peft_fps.layers.fps_layer import FPSLayer
from peft_fps.layers.layer_merge import check_distinct
from peft_fps.layers.lookup import fps_layers
from peft_fps.lifecycle.lora_layers import lora_layers
from peft_fps.lifecycle.merge_whole import merge_whole, unmerge_whole


@dataclass(frozen=True)
class KeptTensors:
    """Weight and bias of a base layer as they were, and the LoRA adapters that were merged into it then."""

    weight: Tensor
    bias: Tensor | None
    merged: tuple[str, ...] = ()


def merge_in_order(
    model: nn.Module,
    configs: Mapping[str, PeftConfig],
    originals: Mapping[str, KeptTensors],
    adapter_names: Sequence[str],
    safe_merge: bool,
) -> dict[str, KeptTensors]:
    """Merge adapters of both methods into the base weights in place.

    Args:
        model: base model with the adapters.
        configs: of all adapters by name.
        originals: of the layers into which LoRA adapters are merged already, by name of the LoRA layer.
        adapter_names: adapters to merge, in this order.
        safe_merge: refuse a merge that would write NaN or infinity.

    Returns:
        The originals of all layers into which LoRA adapters are merged now, for `unmerge_all`.

    Raises:
        TypeError, ValueError: the names are not a list of known and distinct adapters, or a layer cannot be merged.
            Nothing was changed then.
    """
    if isinstance(adapter_names, str):
        raise TypeError(f"adapter_names is {adapter_names!r}, expected a list of names.")
    check_distinct(adapter_names)
    if unknown := [name for name in adapter_names if name not in configs]:
        raise ValueError(f"Cannot merge the adapters {unknown}, expected names among {sorted(configs)}.")
    kept, layers = dict(originals), lora_layers(model)
    with ExitStack() as undo:
        for sparse, group in groupby(adapter_names, key=lambda name: isinstance(configs[name], FPSConfig)):
            names = list(group)
            if sparse:
                before = [(layer, len(layer.merged_adapters)) for layer in fps_layers(model).values()]
                merge_whole(model, names, safe_merge)
                undo.callback(_take_out, before)
                continue
            carrying = {path: layer for path, layer in layers.items() if _carried(layer, names)}
            _check_own(model, carrying)
            for path, layer in carrying.items():
                if not layer.merged:
                    kept[path] = _original(layer)
                undo.callback(_put_back, layer, _copies(layer.get_base_layer(), layer.merged_adapters))
                layer.merge(safe_merge=safe_merge, adapter_names=_carried(layer, names))
        undo.pop_all()
    return kept


def unmerge_all(model: nn.Module, originals: Mapping[str, KeptTensors]) -> None:
    """Put the original weights and biases back in all layers, bit for bit.

    Args:
        model: base model with the adapters.
        originals: from `merge_in_order`.
    """
    unmerge_whole(model, others_restored=True)
    layers = lora_layers(model)
    for path, original in originals.items():
        _put_back(layers[path], original)


def _carried(layer: LoraLayer, names: Sequence[str]) -> list[str]:
    """Return those of the named adapters that a LoRA layer has, in the given order."""
    return [name for name in names if name in layer._get_available_adapters()]


def _check_own(model: nn.Module, layers: Mapping[str, LoraLayer]) -> None:
    """Raise ValueError unless the weights into which LoRA adapters are to be merged are at hand and no other's."""
    holders: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), []).append((name, module))
    for path, layer in layers.items():
        base: Any = layer.get_base_layer()
        if base.weight.device.type == "meta":
            raise ValueError(
                f"{path}: its weight is on the meta device, expected a weight at hand to merge LoRA and FPS adapters "
                "of one model. Load the base model without offloading. Nothing was changed."
            )
        if others := [name for name, module in holders[id(base.weight)] if module is not base]:
            raise ValueError(
                f"{path}: {others[0]} has the same weight (tied weights), expected a weight of its own to merge a "
                f"LoRA adapter into: {others[0]} would change along. Keep the adapter unmerged, or untie the weights "
                "(tie_word_embeddings=False) before it is added. Nothing was changed."
            )


def _original(layer: LoraLayer) -> KeptTensors:
    """Return copies of the base layer's tensors as they are without merged FPS adapters."""
    inner = layer.base_layer
    return _copies(inner._unmerged() if isinstance(inner, FPSLayer) and inner.merged else layer.get_base_layer())


def _copies(base: Any, merged: Sequence[str] = ()) -> KeptTensors:
    """Return copies of a base layer's weight and bias.

    Args:
        base: the base layer.
        merged: names of the LoRA adapters that are merged into it.
    """
    bias = getattr(base, "bias", None)
    return KeptTensors(base.weight.detach().clone(), None if bias is None else bias.detach().clone(), tuple(merged))


@torch.no_grad()
def _put_back(layer: LoraLayer, kept: KeptTensors) -> None:
    """Write the kept tensors into the base layer, and mark as merged the LoRA adapters that were merged then."""
    base: Any = layer.get_base_layer()
    base.weight.copy_(kept.weight)
    if kept.bias is not None:
        base.bias.copy_(kept.bias)
    layer.merged_adapters[:] = kept.merged


def _take_out(before: Sequence[tuple[FPSLayer, int]]) -> None:
    """Unmerge, in each FPS layer, the adapters that were merged after its first `count`."""
    for layer, count in before:
        layer.take_out(len(layer.merged_adapters) - count)
