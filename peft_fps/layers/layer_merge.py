"""Merging of one layer: add an adapter's changes to the base layer in place, and undo that bit for bit."""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from peft_fps.base.quantisation import SUPPORTED, is_made_of_others
from peft_fps.base.sharded import has_shards
from peft_fps.layers.merge_record import MergeRecord, changed_since, is_finite, present, restore_entries
from peft_fps.layers.placement import PlacedLayer
from peft_fps.layers.tensor_checks import DIVERGED


Undone = tuple[str, MergeRecord, MergeRecord]
"""A merge that was undone: the adapter, its record, and what was overwritten."""


class MergingLayer(PlacedLayer):
    """The part of an FPS layer that merges.

    Attributes:
        merged_adapters: names in the order in which they were merged.
        merge_records: by adapter, what its merge overwrote.
    """

    merge_records: dict[str, MergeRecord]

    writes_in_place = True
    """Whether merging writes into the weight's own numbers; else the weight is made anew."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' changes to the base layer in place, and keep the originals of the entries they touch.

        If anything is raised, nothing is changed.

        Args:
            safe_merge: refuse a merge that would write NaN or infinity.
            adapter_names: adapters to merge, in order; the active ones if None.

        Raises:
            ValueError: a name is there twice, the weight is not at hand, or, with `safe_merge`, the merged weights
                would not be finite.
        """
        if adapter_names is not None and not adapter_names:
            return
        check_distinct(adapter_names or ())
        for name in adapter_names or self.active_adapters:
            self.check_mergeable(name)
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.fps_state]
        for name in names if safe_merge else ():
            self.check_finite(name)
        self.merge_checked(names, safe_merge)

    def merge_checked(self, names: Sequence[str], safe_merge: bool) -> None:
        """Merge adapters whose tensors are checked, all or none.

        Args:
            names: adapters to merge, in order, which this layer has and which are not merged.
            safe_merge: refuse a merge that would write NaN or infinity.

        Raises:
            ValueError: the weight is not at hand, or, with `safe_merge`, the merged weights would not be finite.
        """
        if names:
            self._check_at_hand("merge into")
        before = len(self.merged_adapters)
        try:
            for name in names:
                self.merge_records[name] = self._merge_into(self.base_layer, name)
                self.merged_adapters.append(name)
                if safe_merge and not is_finite(self.base_layer, self.merge_records[name]):
                    raise self._not_finite(name)
        except BaseException:
            self.take_out(len(self.merged_adapters) - before)
            raise

    def _merge_into(self, base: Any, name: str) -> MergeRecord:
        """Add the adapter's changes, times its scale, to a base layer in place."""
        raise NotImplementedError

    def check_mergeable(self, adapter_name: str) -> None:
        """Raise ValueError if the adapter has a gate here, whose change depends on the input.

        Or if the weight's numbers are kept elsewhere, so that the change would be lost.
        """
        if self.threshold(adapter_name) is not None:
            raise ValueError(
                f"{self.module_path}: adapter {adapter_name!r} has a gate (token_gate), expected one without: "
                "at which positions its change counts depends on the input, so no weight can hold it. Keep the "
                "adapter unmerged. Nothing was merged."
            )
        self._check_kept("Nothing was merged.")

    def check_finite(self, adapter_name: str) -> None:
        """Raise ValueError if the adapter's values or bias deltas hold NaN or infinity."""
        if not self.is_finite(adapter_name):
            raise self._not_finite(adapter_name)

    def _not_finite(self, adapter_name: str) -> ValueError:
        return ValueError(
            f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken: {self.module_path} "
            f"would hold NaN or infinity, expected finite weights. {DIVERGED} Nothing was merged."
        )

    def unmerge(self) -> None:
        """Put the originals back, bit for bit, latest merge first. If anything is raised, nothing is changed.

        Warns of numbers that something else has changed since; of these the adapter's change is subtracted.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        self.warn_of_changes(self.take_out(len(self.merged_adapters)))

    def take_out(self, count: int) -> list[Undone]:
        """Undo the latest `count` merges, all or none.

        Returns:
            The merges that were undone, in that order, for `put_back`.
        """
        undone: list[Undone] = []
        try:
            for name in self.merged_adapters[: -count - 1 : -1] if count else ():
                self._check_at_hand("unmerge")
                self._check_kept("Nothing was unmerged.")
                record = self.merge_records[name]
                undone.append((name, record, restore_entries(self.base_layer, record)))
                self.merged_adapters.pop()
                del self.merge_records[name]
        except BaseException:
            self.put_back(undone)
            raise
        return undone

    def warn_of_changes(self, undone: Iterable[Undone]) -> None:
        """Warn, once per adapter, if something else has changed what the merges wrote.

        Args:
            undone: from `take_out`.
        """
        for name, record, merged in undone:
            state = self.fps_state[name]
            changed = 0 if state.warned_of_change_while_merged else changed_since(record, merged)
            if changed:
                state.warned_of_change_while_merged = True
                warnings.warn(
                    f"{self.module_path}: {changed:,} of the numbers that merging {name!r} wrote into this layer have "
                    "changed since (by another method's adapter, an optimizer, a state dict or a cast), expected the "
                    "same. Those that are not the originals again had the adapter's change subtracted: they keep "
                    "what is new, and are exact to rounding. All others are restored bit for bit. To have them all "
                    "so, unmerge before anything else changes; with LoRA adapters, share a PeftMixedModel "
                    "(get_peft_model(..., mixed=True)). This warning comes once, other layers may have changed too.",
                    stacklevel=3,
                )

    def put_back(self, undone: list[Undone]) -> None:
        """Redo, bit for bit, the merges that `take_out` has undone. What the adapters hold by now does not matter."""
        for name, record, merged in reversed(undone):
            restore_entries(self.base_layer, merged)
            self.merge_records[name] = record
            self.merged_adapters.append(name)

    def _check_kept(self, outcome: str) -> None:
        """Raise ValueError if what is written into the weight is lost, because its numbers are kept elsewhere.

        What was merged cannot be taken out of it then, nor out of a copy. Others may have changed the base layer so
        since it was adapted.

        Args:
            outcome: what has happened, for the message.
        """
        if not self.writes_in_place:
            return
        weight = self.weight_tensor
        if is_made_of_others(weight):
            raise ValueError(
                f"{self.module_path}: its weight is a {type(weight).__name__}, expected a plain tensor to write into, "
                f"or one that the adapter found quantised by {SUPPORTED}: what is written into this one may be lost. "
                f"Merge into the unquantised base and quantise what comes out, or keep the adapter unmerged. {outcome}"
            )
        held = getattr(self.base_layer, "_parameters", {}).values()  # plain tensors too, under torch.func
        if not isinstance(weight, nn.Parameter) and all(weight is not each for each in held):
            raise ValueError(
                f"{self.module_path}: its weight is computed from other tensors since the adapter was attached (by "
                "pruning, weight normalisation or a parametrization), expected a parameter: what is written into it "
                "is lost when it is computed again. Make it a parameter (torch.nn.utils.prune.remove, "
                f"remove_weight_norm, parametrize.remove_parametrizations), or keep the adapter unmerged. {outcome}"
            )

    def _check_at_hand(self, verb: str) -> None:
        """Raise ValueError if the base weight is on the meta device, where nothing that is written stays."""
        if self.weight_tensor.device.type == "meta":
            raise ValueError(
                f"{self.module_path}: its weight is on the meta device, expected a weight at hand to {verb}. Load the "
                "base model's weights first, or let the whole model do it (model.merge_adapter() and "
                "model.unmerge_adapter() bring weights that accelerate offloads). Nothing was changed."
            )


def warn_of_loss(layer: Any, incompatible_keys: Any) -> None:
    """Hook on `load_state_dict`: warn, once per adapter, if the new base weight lacks what counts as merged."""
    name = layer.merged_adapters[-1] if layer.merged else ""
    if not name or has_shards(layer) or layer.weight_tensor.device.type == "meta":
        return
    state, record = layer.fps_state[name], layer.merge_records[name]
    if state.warned_of_change_while_merged or not changed_since(record, present(layer.base_layer, record)):
        return
    state.warned_of_change_while_merged = True
    warnings.warn(
        f"{layer.module_path}: adapter {name!r} is merged, and load_state_dict has brought a base weight without "
        "what was merged, expected one with it: the model computes with the loaded weight alone. Call "
        "model.unmerge_adapter() before you load, or now if the base weights are those from before the merge. This "
        "warning comes once, other layers may have been loaded so too.",
        stacklevel=2,
    )


def check_distinct(names: str | Iterable[str]) -> None:
    """Raise ValueError if a name is there twice."""
    listed = [names] if isinstance(names, str) else list(names)
    if twice := sorted({name for name in listed if listed.count(name) > 1}):
        raise ValueError(
            f"The adapters {listed} hold {', '.join(map(repr, twice))} more than once, expected each name once. To "
            "let an adapter count more, scale it with model.set_scale. Nothing was changed."
        )
