"""What saving an adapter records about it, under `record` in `adapter_config.json`.

Format version 1 kept the same fields one by one at the top level of the file.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME

from peft_fps.checkpoint.field_checks import check_indices, check_names, check_type
from peft_fps.selection.calibration_record import CalibrationRecord
from peft_fps.selection.module_sizes import ModuleSizes


FORMAT_VERSION = 2
"""Of the adapter files that this package writes. It reads older ones too."""

CONFIG_REMEDY = "The config is damaged; fetch or save the adapter again."


def check_version(version: Any) -> None:
    """Raise ValueError unless this package can read an adapter of that format version."""
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ValueError(f"format_version is {version!r}, expected an integer of at least 1.")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"format_version is {version}, expected at most {FORMAT_VERSION}: the adapter was written by a newer "
            "peft_fps. Upgrade with `pip install -U peft-fps`."
        )


SavedSizes = Mapping[str, ModuleSizes]
"""Sizes by module path in the base model."""


def allocation_from_json(value: Any, where: str = "allocation") -> dict[str, ModuleSizes]:
    """Return the sizes of every module from plain data.

    Args:
        value: a dict from module path to `neurons`, `inputs` and `entries`.
        where: what the error calls it. Default: "allocation".

    Raises:
        TypeError: it is no dict.
        ValueError: the sizes of a module are missing, negative or no integers, or hold more entries than weights. The
            error names the module.
    """
    check_type(where, value, dict, "what an adapter_config.json holds, a dict of sizes by module")
    allocation = {}
    for module, sizes in value.items():
        place = f"{where}[{module!r}]"
        named = isinstance(sizes, dict) and set(sizes) == {"neurons", "inputs", "entries"}
        if not isinstance(module, str) or not named:
            raise ValueError(f"{place} is {sizes!r}, expected the integers 'neurons', 'inputs' and 'entries'.")
        try:
            allocation[module] = ModuleSizes(**sizes)
        except ValueError as error:
            raise ValueError(f"{place} {error}") from error
    return allocation


def allocation_to_json(allocation: SavedSizes) -> dict[str, dict[str, int]]:
    """Return the sizes of every module as plain data."""
    return {module: asdict(sizes) for module, sizes in allocation.items()}


@dataclass(frozen=True)
class AdapterRecord:
    """What saving records about an adapter.

    Attributes:
        allocation: sizes of the adapter's part of every module that it changes.
        calibration: how the entries were chosen; None if they were chosen without data, or that is not known.
        base_fingerprint: `sha256`, `dtype` and `sample` of the base weights, see `fingerprint`; None if they could not
            be read.
        whole_tensors: names of the tensors of the modules that are saved whole; None if the file does not say.
        tensors_sha256: digest of the sparse tensors, see `tensors_digest`; None if the file does not say.
        pickled: whether the tensors were saved with `safe_serialization=False`. Only then a pickled file is loaded.
        selecting_blocks: indices of the blocks that select tokens; None if the adapter selects none.

    Raises:
        TypeError, ValueError: names the field, what was found and what is expected.
    """

    allocation: SavedSizes
    calibration: CalibrationRecord | None = None
    base_fingerprint: Mapping[str, str] | None = None
    whole_tensors: tuple[str, ...] | None = None
    tensors_sha256: str | None = None
    pickled: bool = False
    selecting_blocks: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_fingerprint_form("base_fingerprint", self.base_fingerprint)
        check_names("whole_tensors", self.whole_tensors, tuple | None)
        if self.tensors_sha256 is not None:
            check_type("tensors_sha256", self.tensors_sha256, str, "None or a string")
        check_type("pickled", self.pickled, bool, "True or False")
        check_indices("selecting_blocks", self.selecting_blocks)

    def renamed(self, names: Iterable[str]) -> "AdapterRecord":
        """Return the record with its modules under other names, in the same order."""
        return replace(self, allocation=dict(zip(names, self.allocation.values(), strict=True)))

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain data. Versions without token selection read it where none is asked for."""
        blocks = {} if self.selecting_blocks is None else {"selecting_blocks": list(self.selecting_blocks)}
        return {
            "allocation": allocation_to_json(self.allocation),
            "calibration": None if self.calibration is None else self.calibration.to_json(),
            "base_fingerprint": None if self.base_fingerprint is None else dict(self.base_fingerprint),
            "whole_tensors": None if self.whole_tensors is None else list(self.whole_tensors),
            "tensors_sha256": self.tensors_sha256,
            "pickled": self.pickled,
            **blocks,
        }

    @classmethod
    def from_json(cls, value: Any, where: str = "record") -> "AdapterRecord":
        """Return the record that plain data holds.

        Args:
            value: as `to_json` returns it. All but `allocation` may be missing.
            where: what errors call it; "" for the top level of the file.

        Raises:
            TypeError, ValueError: names the field, what was found, what is expected and what to do.
        """
        within = f"{where}." if where else ""
        try:
            check_type(where or "record", value, dict, "None or what an adapter_config.json holds")
            names = [field.name for field in fields(cls)]
            if unknown := sorted(str(key) for key in value if key not in names):
                raise ValueError(f"{where} holds {', '.join(unknown)}, expected {', '.join(names)} alone.")
            if value.get("allocation") is None:
                raise ValueError(f"{within}allocation is None, expected the sizes of every module.")
            calibration, tensors = value.get("calibration"), value.get("whole_tensors")
            blocks = value.get("selecting_blocks")
            allocation = allocation_from_json(value["allocation"], f"{within}allocation")
            if calibration is not None:
                calibration = CalibrationRecord.from_json(calibration, f"{within}calibration")
            return cls(
                allocation,
                calibration,
                value.get("base_fingerprint"),
                tuple(tensors) if isinstance(tensors, list) else tensors,
                value.get("tensors_sha256"),
                value.get("pickled", False),
                tuple(blocks) if isinstance(blocks, list) else blocks,
            )
        except (TypeError, ValueError) as error:
            raise type(error)(f"{error} {CONFIG_REMEDY}") from error


def record_from(record: Any, flat: Mapping[str, Any]) -> AdapterRecord | None:
    """Return the record that a config was given, in the form of either format version; None if it was given none.

    Args:
        record: a record, or what `to_json` returns.
        flat: the same fields one by one, as format version 1 has them. Without an allocation they say nothing.

    Raises:
        TypeError, ValueError: as `AdapterRecord.from_json`, or both forms were given.
    """
    given = {name: value for name, value in flat.items() if value is not None}
    if record is not None and given:
        raise ValueError(f"record was given beside {', '.join(given)}, expected one of the two. {CONFIG_REMEDY}")
    if record is not None:
        return record if isinstance(record, AdapterRecord) else AdapterRecord.from_json(record)
    found = AdapterRecord.from_json({"allocation": {}, **given}, where="") if given else None
    return found if "allocation" in given else None


def read_record(folder: Path) -> AdapterRecord | None:
    """Return the record of the adapter that is saved in a folder; None if its config has none.

    Args:
        folder: folder with `adapter_config.json`.

    Raises:
        OSError: there is no such file.
        TypeError, ValueError: the record is damaged.
    """
    content = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    return record_from(content.get("record"), {field.name: content.get(field.name) for field in fields(AdapterRecord)})


def check_fingerprint_form(name: str, value: Any) -> None:
    """Raise ValueError unless the value is None or a dict with the strings `sha256` and `dtype`."""
    strings = isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("sha256", "dtype"))
    if value is not None and not strings:
        raise ValueError(
            f"{name} is {value!r} of type {type(value).__name__}, expected None or a dict with the strings 'sha256' "
            "and 'dtype'."
        )
