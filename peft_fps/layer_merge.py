"""Merging of one layer: add an adapter's changes to the base layer in place, and undo that bit for bit."""

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge

from peft_fps.merging import MergeRecord, is_finite, restore_entries, trial_copy
from peft_fps.placement import PlacedLayer


Undone = tuple[str, MergeRecord, MergeRecord]
"""A merge that was undone: the adapter, its record, and what was overwritten."""


class MergingLayer(PlacedLayer):
    """The part of an FPS layer that merges.

    Attributes:
        merged_adapters: names in the order in which they were merged.
        merge_records: by adapter, what its merge overwrote.
    """

    merge_records: dict[str, MergeRecord]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' changes to the base layer in place, keeping the originals of the entries they touch.

        Whatever is raised, nothing is changed.

        Raises:
            ValueError: a name is there twice, the weight is not at hand, or, with `safe_merge`, the merged weights
                would not be finite.
        """
        if adapter_names is not None and not adapter_names:
            return
        check_distinct(adapter_names or ())
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.fps_state]
        if names:
            self._check_at_hand("merge into")
        if safe_merge:
            self.check_merge(names)
        before = len(self.merged_adapters)
        try:
            for name in names:
                self.merge_records[name] = self._merge_into(self.base_layer, name)
                self.merged_adapters.append(name)
        except BaseException:
            self.take_out(len(self.merged_adapters) - before)
            raise

    def _merge_into(self, base: Any, name: str) -> MergeRecord:
        """Add the adapter's changes, times its scale, to a base layer in place."""
        raise NotImplementedError

    def check_merge(self, names: list[str]) -> None:
        """Raise ValueError if merging the named adapters, one after the other, would write NaN or infinity."""
        pending = [name for name in names if name in self.fps_state and name not in self.merged_adapters]
        trial = trial_copy(self.base_layer) if pending else None
        for name in pending:
            finite = all(bool(torch.isfinite(parameter.detach()).all()) for parameter in self.adapter_parameters(name))
            if finite:
                finite = is_finite(trial, self._merge_into(trial, name))
            if not finite:
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {name} seems to be broken: {self.module_path} "
                    "would hold NaN or infinity, expected finite weights. Nothing was merged; load an intact adapter."
                )

    def unmerge(self) -> None:
        """Put the originals back, bit for bit, latest merge first; whatever is raised, nothing is changed."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        self.take_out(len(self.merged_adapters))

    def take_out(self, count: int) -> list[Undone]:
        """Undo the latest `count` merges, all or none; returns what `put_back` needs."""
        undone: list[Undone] = []
        try:
            for name in self.merged_adapters[: -count - 1 : -1] if count else ():
                self._check_at_hand("unmerge")
                record = self.merge_records[name]
                undone.append((name, record, restore_entries(self.base_layer, record)))
                self.merged_adapters.pop()
                del self.merge_records[name]
        except BaseException:
            self.put_back(undone)
            raise
        return undone

    def put_back(self, undone: list[Undone]) -> None:
        """Do merges again that `take_out` has undone, bit for bit, whatever the adapters hold by now."""
        for name, record, merged in reversed(undone):
            restore_entries(self.base_layer, merged)
            self.merge_records[name] = record
            self.merged_adapters.append(name)

    def _check_at_hand(self, verb: str) -> None:
        """Raise ValueError if the base weight is on the meta device, where nothing that is written stays."""
        if self.weight_tensor.device.type == "meta":
            raise ValueError(
                f"{self.module_path}: its weight is on the meta device, expected a weight at hand to {verb}. Load the "
                "base model's weights first, or let the whole model do it (model.merge_adapter() and "
                "model.unmerge_adapter() bring weights that accelerate offloads). Nothing was changed."
            )


def check_distinct(names: str | Iterable[str]) -> None:
    """Raise ValueError if a name is there twice."""
    listed = [names] if isinstance(names, str) else list(names)
    if twice := sorted({name for name in listed if listed.count(name) > 1}):
        raise ValueError(
            f"The adapters {listed} hold {', '.join(map(repr, twice))} more than once, expected each name once. To "
            "let an adapter count more, scale it with model.set_scale. Nothing was changed."
        )
