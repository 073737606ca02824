"""The forward of FPS layers with sparse changes: multiply with W + ΔW, or beside a base layer that runs as it is."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from peft_fps.base.substitution import call_with, overrides_forward
from peft_fps.layers.entry_layer import EntryLayer
from peft_fps.layers.rebuilt_inputs import keep_input
from peft_fps.layers.sample_names import named_calls, names_for
from peft_fps.layers.tensors_as_read import as_read
from peft_fps.sparse import Kept, Structure, changed_weight, sparse_delta_linear, sparse_linear


class ProductLayer(EntryLayer):
    """A base layer whose weight is multiplied as W + ΔW; the products are those of a linear layer.

    Attributes:
        in_features: as PEFT's layers say it.
        out_features: likewise.
    """

    def __init__(self, base_layer: Any, module_path: str) -> None:
        super().__init__(base_layer, module_path)
        self.in_features, self.out_features = self._features()
        self._overridden = overrides_forward(base_layer)

    def _forward_with(self, names: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = self.base_layer
        if not names:
            result: Tensor = base(x, *args, **kwargs)
            return result
        self._warn_before_training(names)
        structure, values = self.applied(names)
        bias_deltas = self._bias_deltas(names)
        if not self._owns_forward(base):
            return self._forward_around(base, structure, values, bias_deltas, names, x, *args, **kwargs)
        return self._own_product(structure, values, bias_deltas, names, x, *args, **kwargs)

    def _own_product(
        self,
        structure: Structure,
        values: Tensor,
        bias_deltas: list[Tensor],
        names: list[str],
        x: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Return what a base layer that does nothing but its class's product makes of `x` with W + ΔW and b + Δb."""
        dtype = _autocast_dtype(x) or x.dtype
        bias = self.base_layer.bias
        for delta in bias_deltas:
            bias = bias + delta
        kept = self._kept(x, dtype, values, structure, names)
        bias = None if bias is None else bias.to(dtype)
        return self._product(x.to(dtype), values, bias, structure, kept, *args, **kwargs)

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

    # --- what models read off the layer -----------------------------------------------------------------------------

    @property
    def weight(self) -> Tensor:
        """The weight with which the layer computes: W + ΔW of the active adapters, with gradients for ΔW."""

        def changed(names: list[str]) -> Tensor:
            structure, values = self.applied(names)
            return changed_weight(self.base_layer.weight, values, structure)

        return self._as_read("weight", changed)

    @property
    def bias(self) -> Tensor:
        """The bias with which the layer computes, None if it has none."""

        def changed(names: list[str]) -> Tensor:
            deltas = self._bias_deltas(names)
            return self._changed_bias(deltas) if deltas else self.base_layer.bias

        return self._as_read("bias", changed)

    def _as_read(self, own: str, changed: Callable[[list[str]], Tensor]) -> Tensor:
        names = names_for(self) if named_calls.running else None
        held: Tensor = getattr(self.base_layer, own)
        if held is None or self.disable_adapters or self.merged:
            if held is not None and self.disable_adapters and self.merged:
                held = getattr(self._unmerged(), own)
            return held
        carried = {name for name in names or self.active_adapters if self.carries(name)}
        if not carried:
            return held
        if names is not None and len(set(names)) > 1:
            return as_read(held, partial(self._refuse_to_mix, own))
        active = [name for name in self.active_adapters if name in carried] if names is None else [*carried]
        return as_read(held, partial(changed, active))

    def _refuse_to_mix(self, own: str) -> Tensor:
        raise ValueError(
            f"{self.module_path}: the model computes with the {own} that it reads off the layer, expected one that "
            "calls the layer, which adapter_names of several adapters needs. Run the samples of each adapter as a "
            "batch of their own."
        )

    # --- the product with W + ΔW, of a linear layer -----------------------------------------------------------------

    def _kept(
        self, x: Tensor, dtype: torch.dtype, values: Tensor, structure: Structure, names: list[str]
    ) -> Kept | None:
        """What a product in `dtype` keeps of the input for backward; None where it is to decide itself."""
        if not (values.requires_grad and torch.is_grad_enabled()):
            return None
        return keep_input(x, dtype, structure, self.fps_state[names[0]].saved_inputs)

    def _product(
        self,
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        structure: Structure,
        kept: Kept | None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Return `x (W + ΔW)ᵀ + bias`, `(..., neurons)`, of `x` `(..., inputs)` and `bias` `(neurons,)`."""
        return sparse_linear(x, self.base_layer.weight, values, bias, structure, kept)

    def _delta_product(
        self, x: Tensor, values: Tensor, structure: Structure, kept: Kept | None, *args: Any, **kwargs: Any
    ) -> Tensor:
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
        return not self._overridden and self._is_bare(base)

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
        return self._beside_base(result, x, structure, values, bias_deltas, names, *args, **kwargs)

    def _changed_base(
        self, structure: Structure, values: Tensor, bias_deltas: list[Tensor], x: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Run the base layer's own forward, whatever it makes of its weight, with W + ΔW and b + Δb in their place.

        The dense W + ΔW lives until backward, and its gradient is formed for a moment.
        """
        base = self.base_layer
        tensors = {"weight": changed_weight(base.weight, values, structure)}
        if bias_deltas:
            tensors["bias"] = self._changed_bias(bias_deltas)
        return call_with(base, tensors, x, *args, **kwargs)

    def _changed_bias(self, deltas: list[Tensor]) -> Tensor:
        """Return b + Δb, formed in float32 or float64 and rounded once, in the shape and dtype of b."""
        bias: Tensor = self.base_layer.bias
        exact = torch.promote_types(bias.dtype, torch.float32)
        result = bias.to(exact)
        for delta in deltas:
            result = result + delta.to(exact).view(bias.shape)
        return result.to(bias.dtype)

    def _beside_base(
        self,
        result: Tensor,
        x: Tensor,
        structure: Structure,
        values: Tensor,
        bias_deltas: list[Tensor],
        names: list[str],
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Add the change's own product to what the base layer, run as it is with its hooks, made of `x`."""
        dtype = _autocast_dtype(x) or self._cast_dtype(x, values)
        kept = self._kept(x, dtype, values, structure, names)
        delta = self._delta_product(x.to(dtype), values, structure, kept, *args, **kwargs)
        for bias in bias_deltas:
            delta = delta + self._along_neurons(bias)
        return result + delta.to(result.dtype)

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
