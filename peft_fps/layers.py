"""Tuner layers: how each kind of base layer multiplies with W + ΔW."""

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D as TransformersConv1D

from peft_fps.adapters import FPSLayer
from peft_fps.deriving import Derived, renew_after_loading
from peft_fps.inputs import keep_input
from peft_fps.merging import unmerged_copy
from peft_fps.mixed_batch import BASE, by_adapter, check_samples, names_for
from peft_fps.quantised import quantisation
from peft_fps.selection import LayerShape
from peft_fps.sparse import (
    Kept,
    Structure,
    changed_weight,
    dense_delta,
    sparse_conv2d,
    sparse_delta_linear,
    sparse_linear,
)
from peft_fps.substitution import call_with, overrides_forward


class AdaptedLayer(nn.Module, FPSLayer):
    """The forward that all kinds share; a kind adds `_product` and `_delta_product`."""

    base_class: type[nn.Module]

    def __init__(self, base_layer: Any, module_path: str) -> None:
        super().__init__()
        self._setup(base_layer, module_path, layer_shape(base_layer))
        self.in_features, self.out_features = self._features()
        self._overridden = overrides_forward(base_layer)
        self.register_load_state_dict_post_hook(renew_after_loading)

    def __getattr__(self, name: str) -> Any:
        """Return a submodule, or what the base layer has under a public name: models read it off their layers."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("base_layer")
            # private names are how libraries mark the modules they have changed, each its own
            if base is None or name.startswith("_") or not hasattr(base, name):
                raise
        return getattr(base, name)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.make_room(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        # what is derived stays behind: a copy, or another process, checks the tensors anew
        return super().__getstate__() | {"_derived": {name: Derived() for name in self._derived}, "_united": {}}

    def _apply_adapters(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """Add the changes of the active adapters, or for each sample those of the one that `adapter_names` says."""
        adapter_names = names_for(self) if adapter_names is None else adapter_names
        if adapter_names is not None:
            return self._mixed_forward(x, adapter_names, *args, **kwargs)
        if self.disable_adapters or self.merged:
            if self.disable_adapters and self.merged:
                return self._unmerged_forward(x)
            return self._forward_with([], x, *args, **kwargs)
        names = [name for name in self.active_adapters if self.carries(name)]
        return self._forward_with(names, x, *args, **kwargs)

    def _mixed_forward(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        check_samples(self, x, adapter_names)
        carried = set() if self.disable_adapters else {name for name in adapter_names if self.carries(name)}
        names = [name if name in carried else BASE for name in adapter_names]
        return by_adapter(
            lambda name, part: self._forward_with([] if name == BASE else [name], part, *args, **kwargs), x, names
        )

    def _forward_with(self, names: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the base layer as it is now, with the changes of the named adapters."""
        if not names:
            return self.base_layer(x, *args, **kwargs)
        if self.training and torch.is_grad_enabled():
            self._warn_if_unselected(names)
        structure, values = self.applied(names)
        bias_deltas = self._bias_deltas(names)
        if not self._owns_forward():
            if self._overridden:
                return self._changed_base(structure, values, bias_deltas, x, *args, **kwargs)
            result = self.base_layer(x, *args, **kwargs)
            return self._beside_base(result, x, structure, values, bias_deltas, names)
        dtype = _autocast_dtype(x) or x.dtype
        bias = self.base_layer.bias
        for delta in bias_deltas:
            bias = bias + delta
        kept = self._kept(x, dtype, values, structure, names)
        return self._product(x.to(dtype), values, None if bias is None else bias.to(dtype), structure, kept)

    def _bias_deltas(self, names: list[str]) -> list[Tensor]:
        return [
            self.fps_bias[name] if self.scaling[name] == 1 else self.scaled(self.fps_bias[name], name)
            for name in names
            if name in self.fps_bias
        ]

    def _owns_forward(self) -> bool:
        """Whether the base layer does nothing but its class's product: no hooks, no forward put over its own."""
        return type(self.base_layer).forward is self.base_class.forward and self._is_bare()

    def _is_bare(self) -> bool:
        """Whether calling the base layer runs its class's forward and nothing else."""
        base = self.base_layer
        hooked = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
        return "forward" not in vars(base) and not hooked

    def _changed_base(
        self, structure: Structure, values: Tensor, bias_deltas: list[Tensor], x: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Run the base layer's own forward, whatever it makes of its weight, with W + ΔW and b + Δb in their place.

        The dense W + ΔW lives until backward, and its gradient is formed for a moment.
        """
        base = self.base_layer
        tensors = {"weight": changed_weight(base.weight, values, structure)}
        if bias_deltas:
            exact = torch.promote_types(base.bias.dtype, torch.float32)
            tensors["bias"] = sum((delta.to(exact) for delta in bias_deltas), base.bias.to(exact)).to(base.bias.dtype)
        return call_with(base, tensors, x, *args, **kwargs)

    def _beside_base(
        self,
        result: Tensor,
        x: Tensor,
        structure: Structure,
        values: Tensor,
        bias_deltas: list[Tensor],
        names: list[str],
    ) -> Tensor:
        """Add the change's own product to what the base layer, run as it is with its hooks, made of `x`."""
        dtype = _autocast_dtype(x) or self._cast_dtype(x, values)
        delta = self._delta_product(x.to(dtype), values, structure, self._kept(x, dtype, values, structure, names))
        for bias in bias_deltas:
            delta = delta + self._along_neurons(bias)
        return result + delta.to(result.dtype)

    def _cast_dtype(self, x: Tensor, values: Tensor) -> torch.dtype:
        # peft.helpers.disable_input_dtype_casting clears the flag
        return values.dtype if self.cast_input_dtype_enabled else x.dtype

    def _unmerged_forward(self, x: Tensor) -> Tensor:
        """The base layer's output although adapters are merged into it; writes nothing."""
        records = [self.merge_records[name] for name in reversed(self.merged_adapters)]
        result: Tensor = unmerged_copy(self.base_layer, records)(x)
        return result

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # called while a graph is traced
    def _warn_if_unselected(self, names: list[str]) -> None:
        for name in names:
            state = self.fps_state[name]
            if not (state.selected or state.warned):
                state.warned = True
                warnings.warn(
                    f"Adapter {name!r} is being trained without calibration: its entries were chosen by weight "
                    "magnitude alone. Add `model.calibrate(train_dataloader)` before training, or "
                    "`callbacks=[FPSCallback()]` to the Trainer.",
                    stacklevel=2,
                )

    def _along_neurons(self, bias: Tensor) -> Tensor:
        """Shape a `(neurons,)` bias so that it adds to the layer's output."""
        return bias

    def _features(self) -> tuple[int, int]:
        return self.shape.inputs, self.shape.neurons

    def _kept(
        self, x: Tensor, dtype: torch.dtype, values: Tensor, structure: Structure, names: list[str]
    ) -> Kept | None:
        """What a product in `dtype` keeps of the input for backward; None where it is to decide itself."""
        if not (values.requires_grad and torch.is_grad_enabled()):
            return None
        return keep_input(x, dtype, structure, self.fps_state[names[0]].saved_inputs)

    def _product(
        self, x: Tensor, values: Tensor, bias: Tensor | None, structure: Structure, kept: Kept | None
    ) -> Tensor:
        return sparse_linear(x, self.base_layer.weight, values, bias, structure, kept)

    def _delta_product(self, x: Tensor, values: Tensor, structure: Structure, kept: Kept | None) -> Tensor:
        return sparse_delta_linear(x, values, structure, kept)


class Linear(AdaptedLayer):
    """`torch.nn.Linear` with sparse changes: `y = x (W + ΔW)ᵀ + b + Δb`, weight `(out_features, in_features)`."""

    base_class = nn.Linear

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map `(..., in_features)` to `(..., out_features)`."""
        return self._apply_adapters(x, *args, **kwargs)


class Conv1DLinear(AdaptedLayer):
    """transformers' `Conv1D` with sparse changes: linear, with the weight stored as `(in_features, out_features)`.

    "Linear" is in the name because PEFT finds wrapped linear layers by it (`target_modules="all-linear"`).
    """

    base_class = TransformersConv1D
    transposed = True

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map `(..., in_features)` to `(..., out_features)`."""
        return self._apply_adapters(x, *args, **kwargs)


class Conv2d(AdaptedLayer):
    """`torch.nn.Conv2d` with sparse changes; a neuron is an output channel, its inputs a flattened patch."""

    base_class = nn.Conv2d

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map `(batch, in_channels, height, width)` to `(batch, out_channels, height', width')`."""
        return self._apply_adapters(x, *args, **kwargs)

    def _along_neurons(self, bias: Tensor) -> Tensor:
        return bias[:, None, None]

    def _features(self) -> tuple[int, int]:
        return self.base_layer.in_channels, self.base_layer.out_channels

    def _kept(
        self, x: Tensor, dtype: torch.dtype, values: Tensor, structure: Structure, names: list[str]
    ) -> Kept | None:
        return None

    def _product(
        self, x: Tensor, values: Tensor, bias: Tensor | None, structure: Structure, kept: Kept | None
    ) -> Tensor:
        x, padding = padded_input(self.base_layer, x)
        base = self.base_layer
        geometry = (base.stride, padding, base.dilation, base.groups)
        return sparse_conv2d(x, base.weight, values, bias, structure, geometry)

    def _delta_product(self, x: Tensor, values: Tensor, structure: Structure, kept: Kept | None) -> Tensor:
        x, padding = padded_input(self.base_layer, x)
        base = self.base_layer
        delta = dense_delta(values, structure, base.weight.shape).to(x.dtype)
        return F.conv2d(x, delta, None, base.stride, padding, base.dilation, base.groups)


def is_biased_norm(module: nn.Module) -> bool:
    """Whether a base layer is a LayerNorm with a bias, which `bias="with_norms"` trains."""
    return isinstance(module, nn.LayerNorm) and module.weight is not None and module.bias is not None


def layer_shape(base_layer: Any) -> LayerShape:
    """Return neurons, fan-in and bias of a supported base layer; a norm has no fan-in."""
    if is_biased_norm(base_layer):
        return LayerShape(base_layer.bias.numel(), 0, True)
    if quantisation(base_layer) is not None:  # 4-bit weights are packed in another shape
        return LayerShape(base_layer.out_features, base_layer.in_features, base_layer.bias is not None)
    shape = base_layer.weight.shape
    neurons, inputs = (
        (shape[1], shape[0]) if isinstance(base_layer, TransformersConv1D) else (shape[0], shape[1:].numel())
    )
    return LayerShape(neurons, inputs, getattr(base_layer, "bias", None) is not None)


def padded_input(base: Any, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Return the input of a zero-padded convolution that equals `base` on `x`, and its padding.

    Padding modes other than zeros, and uneven `"same"` padding, are applied to the input, as `nn.Conv2d` itself does.
    """
    sides = base._reversed_padding_repeated_twice
    if base.padding_mode != "zeros":
        return F.pad(x, sides, mode=base.padding_mode), (0, 0)
    if isinstance(base.padding, str):
        return F.pad(x, sides), (0, 0)
    return x, base.padding


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype autocast would give a product of `x`, None where it would leave it."""
    kind = x.device.type
    if x.dtype in (torch.float64, torch.complex64, torch.complex128) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)
