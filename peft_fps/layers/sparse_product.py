"""The forward of FPS layers with sparse changes: multiply with W + ΔW, or beside a base layer that runs as it is."""

import warnings
from typing import Any

import torch
from torch import Tensor

from peft_fps.base.quantisation import is_made_of_others, stored_weight
from peft_fps.base.substitution import call_with, overrides_forward
from peft_fps.layers.changed_layer import Change, ChangedLayer
from peft_fps.layers.rebuilt_inputs import keep_input
from peft_fps.layers.token_gate import passing, relative_magnitude
from peft_fps.sparse import Kept, changed_weight, sparse_delta_linear, sparse_linear


class ProductLayer(ChangedLayer):
    """A base layer whose weight is multiplied as W + ΔW; the products are those of a linear layer.

    Attributes:
        in_features: number of inputs, under the name that PEFT's layers use; the channels of a convolution.
        out_features: number of neurons, likewise.
        neuron_axis: axis of the output that runs over neurons.
    """

    neuron_axis = -1

    def __init__(self, base_layer: Any, module_path: str) -> None:
        super().__init__(base_layer, module_path)
        self.in_features, self.out_features = self._features()
        self._known_base: tuple[type, bool] = (type(base_layer), overrides_forward(base_layer))

    def _forward_with(self, names: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = self.base_layer
        if not names:
            result: Tensor = base(x, *args, **kwargs)
            return result
        self._warn_before_training(names)
        if self.fps_threshold is not None and any(name in self.fps_threshold for name in names):
            return self._gated_forward(names, x, *args, **kwargs)
        change = self.change_of(names)
        if not self._owns_forward(base):
            return self._forward_around(change, x, *args, **kwargs)
        return self._own_product(change, x, *args, **kwargs)

    def _own_product(self, change: Change, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return what a base layer that does nothing but its class's product makes of `x` with W + ΔW and b + Δb."""
        dtype = _autocast_dtype(x) or x.dtype
        bias = self.base_layer.bias
        for delta in change.bias_deltas:
            bias = bias + delta
        kept = self._kept(change, x, dtype)
        bias = None if bias is None else bias.to(dtype)
        return self._product(change, x.to(dtype), bias, kept, *args, **kwargs)

    # --- the product with W + ΔW, of a linear layer -----------------------------------------------------------------

    def _kept(self, change: Change, x: Tensor, dtype: torch.dtype) -> Kept | None:
        """What a product in `dtype` keeps of the input for backward; None where it is to decide itself."""
        if not (change.values.requires_grad and torch.is_grad_enabled()):
            return None
        return keep_input(x, dtype, change.structure, self.fps_state[change.names[0]].saved_inputs)

    def _product(
        self, change: Change, x: Tensor, bias: Tensor | None, kept: Kept | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return `x (W + ΔW)ᵀ + bias`, `(..., neurons)`, of `x` `(..., inputs)` and `bias` `(neurons,)`."""
        return sparse_linear(x, self.base_layer.weight, change.values, bias, change.structure, kept)

    def _delta_product(self, change: Change, x: Tensor, kept: Kept | None, *args: Any, **kwargs: Any) -> Tensor:
        """Return `x ΔWᵀ`, `(..., neurons)`, of `x` `(..., inputs)`."""
        return sparse_delta_linear(x, change.values, change.structure, kept)

    def _along_neurons(self, bias: Tensor) -> Tensor:
        """Shape a `(neurons,)` bias so that it adds to the layer's output."""
        return bias

    def _features(self) -> tuple[int, int]:
        return self.shape.inputs, self.shape.neurons

    # --- base layers with a forward of their own --------------------------------------------------------------------

    @property
    def _overridden(self) -> bool:
        """Whether the base layer's class has a forward of its own."""
        kind, overridden = self._known_base
        if type(self.base_layer) is not kind:  # optimum-quanto replaces the base layer, adapter or not
            overridden = overrides_forward(self.base_layer)
            self._known_base = type(self.base_layer), overridden
        return overridden

    def _owns_forward(self, base: Any) -> bool:
        """Whether the base layer does nothing but its class's product: no hooks, no forward put over its own."""
        return not self._overridden and self._is_bare(base) and not is_made_of_others(base.weight)

    def _forward_around(self, change: Change, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._overridden and not is_made_of_others(self.base_layer.weight):
            return self._changed_base(change, x, *args, **kwargs)
        return self._beside_base(change, self.base_layer(x, *args, **kwargs), x, *args, **kwargs)

    def _changed_base(self, change: Change, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the base layer's own forward, whatever it makes of its weight, with W + ΔW and b + Δb in their place.

        The dense W + ΔW lives until backward, and its gradient is formed for a moment.
        """
        base = self.base_layer
        tensors = {"weight": changed_weight(base.weight, change.values, change.structure)}
        if change.bias_deltas:
            tensors["bias"] = self._changed_bias(change.bias_deltas)
        return call_with(base, tensors, x, *args, **kwargs)

    def _beside_base(self, change: Change, result: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Add the change's own product to what the base layer, run as it is with its hooks, made of `x`."""
        if torch.is_grad_enabled() and x.requires_grad and not result.requires_grad:
            raise ValueError(
                f"{self.module_path}: the quantised base layer ({type(stored_weight(self.base_layer)).__name__}) "
                "gives no gradient to its input, expected one: layers before it would get wrong gradients. "
                "Quantise the weights alone, not activations, or run inference under torch.no_grad()."
            )
        return result + self._added(change, x, *args, **kwargs).to(result.dtype)

    def _added(self, change: Change, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return what the change makes of `x` beside the base layer, its bias deltas included."""
        dtype = _autocast_dtype(x) or self._cast_dtype(x, change.values)
        delta = self._delta_product(change, x.to(dtype), self._kept(change, x, dtype), *args, **kwargs)
        for bias in change.bias_deltas:
            delta = delta + self._along_neurons(bias)
        return delta

    # --- gates ------------------------------------------------------------------------------------------------------

    def _gated_forward(self, names: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Add every adapter's change to what the base layer makes of `x`, at the positions where it counts."""
        plain: Tensor = self.base_layer(x, *args, **kwargs)
        result = plain
        for name in names:
            change = self.change_alone(name, x, *args, **kwargs).to(result.dtype)
            if (threshold := self.threshold(name)) is not None:
                penalty = self.fps_state[name].gate_penalty or 0.0
                magnitude = self.relative_change(change, plain)
                change = change * passing(magnitude, threshold, penalty if self.training else 0.0).to(change.dtype)
            result = result + change
        return result

    @property
    def adds_its_change(self) -> bool:
        """Whether the change adds to the base layer's output, so that it can be told from it."""
        return not self._overridden

    def change_alone(self, adapter_name: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return M(x), what an adapter adds to the base layer's output, without a gate, in the output's shape."""
        return self._added(self.change_of([adapter_name]), x, *args, **kwargs)

    def relative_change(self, change: Tensor, plain: Tensor) -> Tensor:
        """Return r = ‖M(x)‖ / ‖W₀x‖ of every position, without gradient.

        Args:
            change: M(x).
            plain: the base layer's output, bias included.
        """
        bias = getattr(self.base_layer, "bias", None)
        product = plain if bias is None else plain - self._along_neurons(bias)
        return relative_magnitude(change, product, self.neuron_axis)

    def _cast_dtype(self, x: Tensor, values: Tensor) -> torch.dtype:
        # peft.helpers.disable_input_dtype_casting clears the flag
        return values.dtype if self.cast_input_dtype_enabled else x.dtype

    def _warn_before_training(self, names: list[str]) -> None:
        if self.training and torch.is_grad_enabled():
            self._warn_if_unselected(names)

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


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype autocast would give a product of `x`, None where it would leave it."""
    kind = x.device.type
    if x.dtype in (torch.float64, torch.complex64, torch.complex128) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)
