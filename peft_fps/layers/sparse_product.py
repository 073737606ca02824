"""The forward of FPS layers with sparse changes: multiply with W + ΔW, or beside a base layer that runs as it is."""

import warnings
from typing import Any

import torch
from torch import Tensor

from peft_fps.base.substitution import call_with, overrides_forward
from peft_fps.layers.entry_layer import EntryLayer
from peft_fps.layers.rebuilt_inputs import keep_input
from peft_fps.layers.token_gate import passing, relative_magnitude
from peft_fps.sparse import Kept, Structure, changed_weight, sparse_delta_linear, sparse_linear


class ProductLayer(EntryLayer):
    """A base layer whose weight is multiplied as W + ΔW; the products are those of a linear layer.

    Attributes:
        in_features: as PEFT's layers say it.
        out_features: likewise.
        neuron_axis: axis of the output that runs over neurons.
    """

    neuron_axis = -1

    def __init__(self, base_layer: Any, module_path: str) -> None:
        super().__init__(base_layer, module_path)
        self.in_features, self.out_features = self._features()
        self._overridden = overrides_forward(base_layer)

    def _forward_with(self, names: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = self.base_layer
        if not names:
            result: Tensor = base(x, *args, **kwargs)
            return result
        if self.training and torch.is_grad_enabled():
            self._warn_if_unselected(names)
        if self.fps_threshold is not None and any(name in self.fps_threshold for name in names):
            return self._gated_forward(names, x, *args, **kwargs)
        structure, values = self.applied(names)
        bias_deltas = self._bias_deltas(names)
        if not self._owns_forward(base):
            return self._forward_around(base, structure, values, bias_deltas, names, x, *args, **kwargs)
        dtype = _autocast_dtype(x) or x.dtype
        bias = base.bias
        for delta in bias_deltas:
            bias = bias + delta
        kept = self._kept(x, dtype, values, structure, names)
        return self._product(x.to(dtype), values, None if bias is None else bias.to(dtype), structure, kept)

    def applied(self, names: list[str]) -> tuple[Structure, Tensor]:
        """Return the sum of the named adapters' ΔW, each times its scale.

        Args:
            names: of one adapter at least.

        Returns:
            Where its entries lie, and their values `(nnz,)`.
        """
        if len(names) == 1:
            values = self.fps_values[names[0]]
            return self.structure(names[0]), values if self.scaling[names[0]] == 1 else self.scaled(values, names[0])
        united, places = self.united_structure(names)
        scaled = [self.scaled(self.fps_values[name], name) for name in names]
        values = torch.cat([part.to(torch.promote_types(part.dtype, torch.float32)) for part in scaled])
        return united, values.new_zeros(united.positions.numel()).index_add(0, places, values)

    # --- the product with W + ΔW, of a linear layer -----------------------------------------------------------------

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
        """Return `x (W + ΔW)ᵀ + bias`, `(..., neurons)`, of `x` `(..., inputs)` and `bias` `(neurons,)`."""
        return sparse_linear(x, self.base_layer.weight, values, bias, structure, kept)

    def _delta_product(self, x: Tensor, values: Tensor, structure: Structure, kept: Kept | None) -> Tensor:
        """Return `x ΔWᵀ`, `(..., neurons)`, of `x` `(..., inputs)`."""
        return sparse_delta_linear(x, values, structure, kept)

    def _along_neurons(self, bias: Tensor) -> Tensor:
        """Shape a `(neurons,)` bias so that it adds to the layer's output."""
        return bias

    def _features(self) -> tuple[int, int]:
        return self.shape.inputs, self.shape.neurons

    # --- base layers with a forward of their own --------------------------------------------------------------------

    def _owns_forward(self, base: Any) -> bool:
        """Whether the base layer does nothing but its class's product: no hooks, no forward put over its own."""
        return type(base).forward is self.base_class.forward and self._is_bare(base)

    def _forward_around(
        self,
        base: Any,
        structure: Structure,
        values: Tensor,
        bias_deltas: list[Tensor],
        names: list[str],
        x: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        if self._overridden:
            return self._changed_base(structure, values, bias_deltas, x, *args, **kwargs)
        result = base(x, *args, **kwargs)
        return self._beside_base(result, x, structure, values, bias_deltas, names)

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
        return result + self._change(x, structure, values, bias_deltas, names).to(result.dtype)

    def _change(
        self, x: Tensor, structure: Structure, values: Tensor, bias_deltas: list[Tensor], names: list[str]
    ) -> Tensor:
        """Return what the change makes of `x` beside the base layer, its bias deltas included."""
        dtype = _autocast_dtype(x) or self._cast_dtype(x, values)
        delta = self._delta_product(x.to(dtype), values, structure, self._kept(x, dtype, values, structure, names))
        for bias in bias_deltas:
            delta = delta + self._along_neurons(bias)
        return delta

    # --- gates ------------------------------------------------------------------------------------------------------

    def _gated_forward(self, names: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Add every adapter's change to what the base layer makes of `x`, at the positions where it counts."""
        plain: Tensor = self.base_layer(x, *args, **kwargs)
        result = plain
        for name in names:
            change = self.change_alone(name, x).to(result.dtype)
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

    def change_alone(self, adapter_name: str, x: Tensor) -> Tensor:
        """Return M(x), what an adapter adds to the base layer's output, without a gate, in the output's shape."""
        structure, values = self.applied([adapter_name])
        return self._change(x, structure, values, self._bias_deltas([adapter_name]), [adapter_name])

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
