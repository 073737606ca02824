"""W + ΔW and b + Δb of an FPS layer as tensors, and what a model gets that reads them off the layer."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from peft_fps.layers.entry_layer import EntryLayer
from peft_fps.layers.sample_names import named_calls, names_for
from peft_fps.layers.tensors_as_read import as_read, frozen_of
from peft_fps.sparse import Structure, changed_weight


class Change(NamedTuple):
    """What adapters change in a layer together.

    Attributes:
        names: of the adapters, one at least.
        structure: where the entries of ΔW lie.
        values: `(nnz,)` ΔW at these entries.
        bias_deltas: Δb, the sum of these tensors `(neurons,)`; empty if none has one.
    """

    names: list[str]
    structure: Structure
    values: Tensor
    bias_deltas: list[Tensor]


class ChangedLayer(EntryLayer):
    """The part of a layer with entries that sums the changes of adapters.

    Models that read `weight` or `bias` off the layer, in place of calling it, get them with the active changes.
    """

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

    def change_of(self, names: list[str]) -> Change:
        """Return what the named adapters change, one at least."""
        return Change(names, *self.applied(names), self._bias_deltas(names))

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
        noticed, path = partial(self._warn_of_write, own, carried), f"{self.module_path}.{own}"
        if names is not None and len(set(names)) > 1:
            return as_read(held, partial(self._refuse_to_mix, own), noticed, path)
        active = [name for name in self.active_adapters if name in carried] if names is None else [*carried]
        return as_read(held, partial(changed, active), noticed, path)

    def _warn_of_write(self, own: str, names: set[str]) -> None:
        """Warn, once per adapter, that something is about to write to the base layer's tensor in place."""
        states = [self.fps_state[name] for name in sorted(names)]
        if all(state.warned_of_write for state in states):
            return
        for state in states:
            state.warned_of_write = True
        warnings.warn(
            f"{self.module_path}: the {own} of this layer is written to in place, expected one that stays as it is "
            f"while an adapter changes it ({', '.join(map(repr, sorted(names)))}). The adapter's changes do not "
            "follow, so outputs may be wrong from now on. Write to it before the adapter is attached, or merge "
            "the adapter first with model.merge_and_unload(). RWKV rescales weights so when it goes from training to "
            "evaluation and back: set model.config.rescale_every = 0 before the first call. This warning comes once, "
            "other layers may be written to as well.",
            stacklevel=3,
        )

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Accept the base layer's own parameter, which it keeps; models assign it when they tie their weights again.

        Raises:
            ValueError: it is another parameter, and the base layer has one of that name.
        """
        held = self.base_layer._parameters.get(name) if "base_layer" in self._modules else None
        if held is None:
            super().register_parameter(name, param)
        elif frozen_of(param) is not held:
            raise ValueError(
                f"{self.module_path}: its {name} is to be replaced while it has an adapter, expected the {name} that "
                "it had when the adapter was attached. Tie or replace weights of the base model first, or merge the "
                "adapter with model.merge_and_unload(). Nothing was changed."
            )

    def _refuse_to_mix(self, own: str) -> Tensor:
        raise ValueError(
            f"{self.module_path}: the model computes with the {own} that it reads off the layer, expected one that "
            "calls the layer, which adapter_names of several adapters needs. Run the samples of each adapter as a "
            "batch of their own."
        )

    def _changed_bias(self, deltas: list[Tensor]) -> Tensor:
        """Return b + Δb, formed in float32 or float64 and rounded once, in the shape and dtype of b."""
        bias: Tensor = self.base_layer.bias
        exact = torch.promote_types(bias.dtype, torch.float32)
        result = bias.to(exact)
        for delta in deltas:
            result = result + delta.to(exact).view(bias.shape)
        return result.to(bias.dtype)
