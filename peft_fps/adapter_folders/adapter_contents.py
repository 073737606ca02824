"""What a saved adapter holds, as far as that can be told without its base model."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from peft_fps.card.selection_method import describe
from peft_fps.checkpoint import decode, is_left_out
from peft_fps.checkpoint.record import AdapterRecord
from peft_fps.config import FPSConfig
from peft_fps.layers.adapter_state import AdapterState
from peft_fps.selection import LayerSelection, NormSelection
from peft_fps.selection.entries import ModuleEntries


RECORDS = ("record", "auto_mapping")
"""Fields of a config that saving fills in."""

Modules = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Check:
    """One check of an adapter's folder.

    Attributes:
        name: what was checked.
        passed: whether the check was passed; None if it could not be made.
        says: what was wrong, or why the check could not be made.
    """

    name: str
    passed: bool | None
    says: str = ""


@dataclass(frozen=True)
class Inspection:
    """What an adapter folder holds.

    Attributes:
        folder: where it is.
        config: its config; None if that is not valid.
        checks: what was checked, in order.
        tensors: of the adapter file, by module path and name, as on disk; empty if it could not be read.
        heads: tensors of modules that are saved whole, likewise by name.
        file_bytes: size of the adapter file, 0 if there is none.
    """

    folder: Path
    config: FPSConfig | None
    checks: tuple[Check, ...]
    tensors: Modules
    heads: dict[str, Tensor]
    file_bytes: int

    @property
    def problem(self) -> str | None:
        """Name and message of the first check that failed, None if none did."""
        return next((f"{check.name}: {check.says}" for check in self.checks if check.passed is False), None)

    @property
    def method(self) -> str:
        """One line on how the entries were chosen."""
        if self.config is None or self.record is None:
            return "an unknown method"
        return describe(self.config, AdapterState(selected=True, calibration=self.record.calibration))

    @property
    def record(self) -> AdapterRecord | None:
        """What saving has recorded; None if the config is not valid."""
        return None if self.config is None else self.config.record

    @property
    def base_class(self) -> str | None:
        """Name of the base model's class, as PEFT records it where no task type tells it."""
        recorded: Any = None if self.config is None else self.config.auto_mapping
        name = recorded.get("base_model_class") if isinstance(recorded, dict) else None
        return name if isinstance(name, str) else None

    @property
    def layers(self) -> tuple[LayerSelection, ...]:
        """One row for each module, block after block: sizes from the config, the rest from the file."""
        sizes = {} if self.record is None else self.record.allocation
        rows: list[LayerSelection] = []
        trained_biases = self.biases
        for module, size in sorted(sizes.items(), key=lambda item: _by_number(item[0])):
            held = self.tensors.get(module, {})
            entries = held["fps_columns"].numel() if "fps_columns" in held else 0
            biases = trained_biases[module].numel() if module in trained_biases else 0
            total = sum(tensor.nbytes for tensor in held.values())
            if size.is_norm:
                rows.append(NormSelection(module, size.neurons, biases=biases, bytes=total))
            else:
                rows.append(LayerSelection(module, size.neurons, size.inputs, entries, biases, total))
        return tuple(rows)

    @property
    def neurons(self) -> int:
        """Neurons of all modules but norms."""
        return sum(row.neurons for row in self.layers if not isinstance(row, NormSelection))

    @property
    def entries(self) -> dict[str, ModuleEntries]:
        """The selected entries of each module but norms; only of an adapter without a problem."""
        sizes = {row.module: row for row in self.layers if not isinstance(row, NormSelection)}
        return {
            path: ModuleEntries.of_size(held["fps_columns"], held["fps_row_counts"], row.neurons, row.inputs)
            for path, row in sizes.items()
            for held in [{name: decode(name, tensor) for name, tensor in self.tensors[path].items()}]
        }

    @property
    def biases(self) -> dict[str, Tensor]:
        """The bias deltas, by module path. Those that the adapter leaves out are not among them."""
        found = {path: held["fps_bias"] for path, held in self.tensors.items() if "fps_bias" in held}
        return {path: bias for path, bias in found.items() if not is_left_out(bias)}

    @property
    def settings(self) -> dict[str, Any]:
        """The config as plain data, without what saving fills in."""
        held = {} if self.config is None else self.config.to_dict()
        return {key: value for key, value in held.items() if key not in RECORDS}

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, derived figures included."""
        config, layers = self.config, self.layers
        record = None if self.record is None else self.record.to_json()
        weights = sum(layer.neurons * layer.inputs for layer in layers)
        entries = sum(layer.entries for layer in layers)
        return {
            "adapter": str(self.folder),
            "passed": self.problem is None,
            "checks": [asdict(check) for check in self.checks],
            "base_model": {
                "name": config and config.base_model_name_or_path,
                "revision": config and config.revision,
                "fingerprint": record and record["base_fingerprint"],
                "class": self.base_class,
            },
            "method": self.method,
            "calibration": record and record["calibration"],
            "selecting_blocks": record and record.get("selecting_blocks"),
            "config": self.settings,
            "modules": [asdict(layer) | {"share": layer.share} for layer in layers],
            "heads": {
                name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
                for name, tensor in self.heads.items()
            },
            "totals": {
                "modules": len(layers),
                "weights": weights,
                "entries": entries,
                "share": entries / weights if weights else 0.0,
                "biases": sum(layer.biases for layer in layers),
                "head_parameters": sum(tensor.numel() for tensor in self.heads.values()),
                "bytes": sum(layer.bytes for layer in layers),
                "head_bytes": sum(tensor.nbytes for tensor in self.heads.values()),
                "file_bytes": self.file_bytes,
            },
        }


def _by_number(path: str) -> list[tuple[int, str]]:
    """Return a sort key of module paths by which block 10 follows block 9; PEFT saves them in alphabetical order."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in path.split(".")]
