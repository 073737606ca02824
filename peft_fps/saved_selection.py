"""A selection on its own: which entries of which modules, apart from any model and from trained values.

It can be taken from an adapter, given to another one, kept in a file, and compared with another selection.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.utils import CONFIG_NAME
from torch import Tensor, nn

from peft_fps.card.selection_method import METHOD_FIELDS, method_record, plain_method
from peft_fps.checkpoint import FILE_REMEDY, WEIGHTS
from peft_fps.checkpoint.selection_file import read_adapter, read_selection, write_selection
from peft_fps.config import FPSConfig, adapter_config
from peft_fps.layers.adapter_state import AdapterState
from peft_fps.layers.lookup import active_adapter, adapter_layers, adapter_state
from peft_fps.lifecycle.entry_transfer import best_entries, entries_of, give_entries
from peft_fps.lifecycle.selection_report import selection_report
from peft_fps.selection import SelectionReport
from peft_fps.selection.calibration_record import CalibrationRecord
from peft_fps.selection.entries import ModuleEntries, check_same_modules
from peft_fps.selection.overlap import Overlap, measure_overlap


@dataclass(frozen=True, eq=False, repr=False)
class Selection:
    """Which entries of which modules are selected, without their trained values.

    Attributes:
        modules: the entries of each module, by its path in the base model; none of modules that train a bias alone.
        method: how they were chosen, as plain data, None where unknown: `importance`, `order`, `granularity`,
            `calibration` (the whole record) and `base_fingerprint` (of the base model they were chosen on). Copied.

    Raises:
        TypeError, ValueError: the method is not plain data, or its records are not of their form.
    """

    modules: dict[str, ModuleEntries]
    method: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "modules", dict(self.modules))
        object.__setattr__(self, "method", plain_method(self.method))

    @property
    def entries(self) -> int:
        """Selected entries of all modules."""
        return sum(module.entries for module in self.modules.values())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Selection):
            return NotImplemented
        return self.modules == other.modules and self.method == other.method

    def __repr__(self) -> str:
        return f"Selection({self.entries:,} entries in {len(self.modules)} modules, method={self.method})"

    @classmethod
    def of(cls, model: nn.Module, adapter_name: str | None = None) -> "Selection":
        """Take the selection of an adapter, as copies on the CPU.

        Args:
            model: a model with an FPS adapter: a `PeftModel`, or a transformers model after `add_adapter`.
            adapter_name: the active adapter if None.

        Raises:
            ValueError: there is no such adapter, its tensors are not loaded, or they are damaged.
        """
        name = adapter_name or active_adapter(model)
        config, layers = adapter_config(model, name), adapter_layers(model, name)
        return cls(entries_of(model, name), _method(config, adapter_state(layers, name)))

    def apply(
        self, model: nn.Module, adapter_name: str | None = None, *, discard_values: bool = False
    ) -> SelectionReport:
        """Give an adapter these entries with zero changes, instead of those it has. Bias deltas become zero too.

        The numbers of entries per module may differ from those of the adapter, as long as its budget is kept. An
        adapter that was configured by `per_neuron` has no limit. Modules that transformers has renamed since are
        found under their present names. The base model may be another one than the selection was made on.

        Args:
            model: a model with an FPS adapter: a `PeftModel`, or a transformers model after `add_adapter`.
            adapter_name: the active adapter if None.
            discard_values: allow it although training has begun. The learned changes are lost. Default: False.

        Returns:
            What is selected now. It prints as a table.

        Raises:
            ValueError: the adapter has other modules or too small a budget, holds trained changes, is merged, or is
                not loaded. The model is unchanged then.
        """
        name = adapter_name or active_adapter(model)
        give_entries(
            model, name, self.modules, _calibration_record(plain_method(self.method)), discard_values=discard_values
        )
        return selection_report(model, name)

    @classmethod
    def from_scores(
        cls,
        model: nn.Module,
        score: Callable[[str, Tensor], Tensor],
        adapter_name: str | None = None,
        *,
        importance: str = "own scores",
    ) -> "Selection":
        """Select by a score of one's own: as many entries as the adapter has, spread as its config says.

        The config gives `budget`, `budget_pattern` and `per_neuron`, `granularity`, `block_top` and `order`. Its
        importance is not used. The model is not changed. `apply` gives the adapter the entries.

        Args:
            model: a model with an FPS adapter: a `PeftModel`, or a transformers model after `add_adapter`.
            score: from a module's path in the base model and its weight `(neurons, inputs)` to scores of that shape,
                not negative. The largest are selected. A linear layer's weight is `(out_features, in_features)`, that
                of a convolution its filters, flattened. It is called once for every module. All scores are held, in
                float32.
            adapter_name: the active adapter if None.
            importance: name of the score, for reports and records.

        Raises:
            TypeError: scores are no floating tensor.
            ValueError: scores have a wrong shape, are negative, or not finite; or there are fewer entries than the
                granularity needs.
        """
        name = adapter_name or active_adapter(model)
        config, layers = adapter_config(model, name), adapter_layers(model, name)
        modules = best_entries(layers, name, config, score)
        method = {
            "importance": importance,
            "order": config.order,
            "granularity": config.granularity,
            "base_fingerprint": adapter_state(layers, name).base_fingerprint,
        }
        return cls(modules, method)

    @classmethod
    def from_adapter(cls, folder: str | os.PathLike[str]) -> "Selection":
        """Read the selection out of a saved adapter, without a model.

        Args:
            folder: local folder with `adapter_config.json` and `adapter_model.safetensors`.

        Raises:
            TypeError, ValueError: there is no FPS adapter, or its files are damaged.
        """
        folder = Path(folder)
        missing = [name for name in (CONFIG_NAME, WEIGHTS) if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"{folder} lacks {', '.join(missing)}, expected the folder of a saved FPS adapter.")
        config = PeftConfig.from_pretrained(str(folder))
        record = config.record if isinstance(config, FPSConfig) else None
        if not isinstance(config, FPSConfig) or record is None:
            raise ValueError(f"{folder} holds a {type(config).__name__} without saved entries, expected an FPSConfig.")
        modules = read_adapter(folder / WEIGHTS, record.allocation)
        state = AdapterState(selected=True, calibration=record.calibration, base_fingerprint=record.base_fingerprint)
        return cls(modules, _method(config, state))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the selection to one safetensors file. A file of that name is replaced only when all is written.

        Equal selections with their modules in the same order give the same bytes.

        Args:
            path: name of the file. Missing folders are made.
        """
        write_selection(Path(path), self.modules, self.method)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Selection":
        """Read a selection that `save` wrote. Everything is checked.

        Args:
            path: name of the file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, no selection, or written by a newer version.
        """
        modules, method = read_selection(Path(path))
        try:
            return cls(modules, method)
        except ValueError as error:
            raise ValueError(f"{path}: {error} {FILE_REMEDY}") from error

    def overlap(self, other: "Selection") -> Overlap:
        """Compare with a selection of the same modules, say for another task.

        Raises:
            ValueError: the selections are of different modules. The error names one of them.
        """
        remedy = "Compare selections of one base model with the same target_modules."
        theirs, ours = ({path: module.shape for path, module in each.modules.items()} for each in (other, self))
        check_same_modules(theirs, ours, "the other selection", "this selection", remedy)
        mine, others = ({p: m.positions() for p, m in each.modules.items()} for each in (self, other))
        return measure_overlap(mine, others)


def _method(config: FPSConfig, state: AdapterState) -> dict[str, Any]:
    """Return how an adapter's entries were chosen, as plain data, from its config and state."""
    record = method_record(config, state)
    chosen = {key: None if record is None else getattr(record, key) for key in METHOD_FIELDS}
    plain = None if record is None else record.to_json()
    return {**chosen, "calibration": plain, "base_fingerprint": state.base_fingerprint}


def _calibration_record(method: dict[str, Any]) -> CalibrationRecord:
    """Return the record that a selection's method holds, or what the method says of the choice.

    That record may say nothing. Without any, a report would tell what the adapter's config asks for.
    """
    if method.get("calibration") is not None:
        return CalibrationRecord.from_json(method["calibration"], "method['calibration']")
    return CalibrationRecord.from_json({key: method.get(key) for key in METHOD_FIELDS}, "method")
