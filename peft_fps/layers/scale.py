"""Scale an adapter's changes at inference: W + s ΔW, b + s Δb.

A scale is a choice of the moment, as for other methods of PEFT: it is not saved with the adapter, and starts at 1.
Between 0 and 1 it interpolates between base model and fine-tuned model (WiSE-FT, arXiv 2109.01903).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class ScaledLayer:
    """The part of an FPS layer that scales, with the methods that other layers of PEFT have.

    Attributes:
        scaling: scale per adapter.
    """

    scaling: dict[str, float]
    module_path: str
    merged_adapters: list[str]
    active_adapters: list[str]

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the scale of an adapter; nothing happens if the layer does not carry it.

        Raises:
            TypeError, ValueError: the scale is no finite number, or the adapter is merged here.
        """
        self._set_scales({adapter: checked_scale("scale", scale)} if adapter in self.scaling else {})

    def scale_layer(self, scale: float) -> None:
        """Multiply the scales of all active adapters; raises as `set_scale`."""
        factor = checked_scale("scale", scale)
        self._set_scales({name: self.scaling[name] * factor for name in self.active_adapters if name in self.scaling})

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scales of all active adapters, or set them to 1 if `scale` is None; raises as `set_scale`."""
        divisor = None if scale is None else checked_scale("scale", scale)
        if divisor == 0:
            raise ValueError(
                "scale is 0, expected a number to divide by. Call unscale_layer() to set the scales to 1."
            )
        self._set_scales(
            {
                name: 1.0 if divisor is None else self.scaling[name] / divisor
                for name in self.active_adapters
                if name in self.scaling
            }
        )

    def check_scales(self, scales: dict[str, float]) -> None:
        """Raise ValueError if a scale of a merged adapter would change, which the merged weight would not show."""
        for name, scale in scales.items():
            if name in self.merged_adapters and scale != self.scaling[name]:
                raise ValueError(
                    f"{self.module_path}: adapter {name!r} is merged with the scale {self.scaling[name]}, expected an "
                    f"unmerged adapter to scale by {scale}. Call model.unmerge_adapter() first. Nothing was changed."
                )

    def _set_scales(self, scales: dict[str, float]) -> None:
        self.check_scales(scales)
        self.scaling.update(scales)

    def scaled(self, tensor: Tensor, adapter: str) -> Tensor:
        """Return a tensor of the adapter times its scale; the product has float32 at least, so that it rounds once."""
        scale = self.scaling[adapter]
        if scale == 1:
            return tensor
        return tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * scale


def set_scale(model: nn.Module, adapter_name: str, scale: float) -> None:
    """Set the scale of an adapter in all layers.

    Args:
        model: has the adapter.
        adapter_name: its name.
        scale: factor of the changes, finite.

    Raises:
        TypeError, ValueError: the scale is no finite number, there is no such adapter, or it is merged. Nothing is
            changed then.
    """
    scale = checked_scale("scale", scale)
    layers = scaled_layers(model)
    known = sorted({name for layer in layers for name in layer.scaling})
    if adapter_name not in known:
        raise ValueError(f"Found no FPS adapter named {adapter_name!r} to scale, expected one of {known}.")
    carrying = [layer for layer in layers if adapter_name in layer.scaling]
    for layer in carrying:
        layer.check_scales({adapter_name: scale})
    for layer in carrying:
        layer.set_scale(adapter_name, scale)


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Multiply the scales of all FPS adapters within the context; `peft.helpers` has the same for LoRA alone.

        with peft_fps.rescale_adapter_scale(model, 0.5):
            logits = model(**batch).logits

    The scales are the model's, so other threads that run it meanwhile compute with them too, as with PEFT's own
    `disable_adapter`.

    Args:
        model: a model with FPS adapters, wrapped or not.
        multiplier: of the scales.

    Raises:
        TypeError, ValueError: the multiplier is no finite number, there is no FPS layer, or an adapter is merged.
    """
    multiplier = checked_scale("multiplier", multiplier)
    layers = scaled_layers(model)
    if not layers:
        raise ValueError(f"The model ({type(model).__name__}) has no FPS layer, expected one with an FPS adapter.")
    before = [dict(layer.scaling) for layer in layers]
    wanted = [{name: scale * multiplier for name, scale in scales.items()} for scales in before]
    for layer, scales in zip(layers, wanted, strict=True):
        layer.check_scales(scales)
    for layer, scales in zip(layers, wanted, strict=True):
        layer.scaling.update(scales)
    try:
        yield
    finally:
        for layer, scales in zip(layers, before, strict=True):
            # adapters that were deleted meanwhile stay deleted
            layer.scaling.update({name: scale for name, scale in scales.items() if name in layer.scaling})


def scaled_layers(model: nn.Module) -> list[ScaledLayer]:
    """Return all layers of a model that scale."""
    return [module for module in model.modules() if isinstance(module, ScaledLayer)]


def checked_scale(name: str, scale: Any) -> float:
    """Return a scale as a float.

    Raises:
        TypeError, ValueError: it is no finite number.
    """
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"{name} is {scale!r} of type {type(scale).__name__}, expected a number.")
    if not math.isfinite(scale):
        raise ValueError(f"{name} is {scale}, expected a finite number.")
    return float(scale)
