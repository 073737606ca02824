"""How far two adapters or selections agree: entries, values on the entries that both have, and settings."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_fps.adapter_folders.soundness import inspect_adapter
from peft_fps.adapter_folders.sources import adapter_folder
from peft_fps.saved_selection import Selection
from peft_fps.selection.entries import ModuleEntries, check_same_modules
from peft_fps.selection.overlap import Overlap, measure_overlap


@dataclass(frozen=True)
class Side:
    """One of the two adapters or selections that are compared.

    Attributes:
        name: as the user gave it.
        entries: by module path.
        values: values `(nnz,)` of an adapter, by module path; None for a selection.
        settings: of an adapter its config; of a selection how it was made.
        fingerprint: of the base model, None where it is not known.
        bytes: size of the file.
    """

    name: str
    entries: Mapping[str, ModuleEntries]
    values: Mapping[str, Tensor] | None
    settings: Mapping[str, Any]
    fingerprint: str | None
    bytes: int


@dataclass(frozen=True)
class Values:
    """Values at entries that both sides have.

    Attributes:
        shared: number of these entries.
        mean_difference: mean |first - second|; None where there are none.
        largest_difference: of any entry.
        mean_size: mean (|first| + |second|) / 2, what the difference is to be seen against.
        same_sign: share of entries whose values have the same sign, or are both 0.
    """

    shared: int
    mean_difference: float | None
    largest_difference: float | None
    mean_size: float | None
    same_sign: float | None


@dataclass(frozen=True)
class ModuleComparison:
    """The comparison of one module.

    Attributes:
        module: path of the module.
        first: number of entries of the first side.
        second: number of entries of the second side.
        shared: number of entries that both have.
        either: number of entries that at least one has.
        jaccard: `shared / either`, 1 if neither has an entry.
        values: at the shared entries, None unless both sides are adapters.
    """

    module: str
    first: int
    second: int
    shared: int
    either: int
    jaccard: float
    values: Values | None


@dataclass(frozen=True)
class Comparison:
    """What two sides have in common, and where they differ.

    Attributes:
        first: one of the two.
        second: the other.
        modules: one row for each module that one of them has.
        overlap: of the entries; those of modules that only one side has count as not shared.
        values: at shared entries of all modules, None unless both are adapters.
        fields: settings that differ, with both values.
    """

    first: Side
    second: Side
    modules: tuple[ModuleComparison, ...]
    overlap: Overlap
    values: Values | None
    fields: Mapping[str, tuple[Any, Any]]

    @property
    def only(self) -> tuple[list[str], list[str]]:
        """Modules that only the first has, and those that only the second has."""
        one, other = self.first.entries, self.second.entries
        return [path for path in one if path not in other], [path for path in other if path not in one]

    @property
    def same_base(self) -> bool | None:
        """Whether both were made from the same base weights, None where that is not known."""
        one, other = self.first.fingerprint, self.second.fingerprint
        return None if one is None or other is None else one == other

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        sides = {
            key: {
                "name": side.name,
                "kind": "selection" if side.values is None else "adapter",
                "modules": len(side.entries),
                "entries": sum(module.entries for module in side.entries.values()),
                "file_bytes": side.bytes,
            }
            for key, side in (("first", self.first), ("second", self.second))
        }
        return sides | {
            "same_base": self.same_base,
            "jaccard": self.overlap.total,
            "shared": sum(row.shared for row in self.modules),
            "either": sum(row.either for row in self.modules),
            "values": self.values and asdict(self.values),
            "only_in_first": self.only[0],
            "only_in_second": self.only[1],
            "differing_settings": {key: list(values) for key, values in self.fields.items()},
            "blocks": self.overlap.blocks,
            "modules": [asdict(row) for row in self.modules],
        }


def load_side(name: str, revision: str | None = None) -> Side:
    """Read an adapter (a folder, or a name on the Hub) or a selection (a file); everything is checked.

    Raises:
        ValueError: there is neither, or its files are damaged.
    """
    path = Path(name).expanduser()
    if path.is_file():
        selection = Selection.load(path)
        method = selection.method
        digest = (method.get("base_fingerprint") or {}).get("sha256")
        settings = {key: value for key, value in method.items() if key not in ("base_fingerprint", "calibration")}
        record = _flat(method.get("calibration"))
        return Side(name, selection.modules, None, settings | record, digest, path.stat().st_size)
    found = inspect_adapter(adapter_folder(name, revision))
    if found.problem is not None or found.record is None:
        raise ValueError(f"{name} is damaged: {found.problem}")
    entries = found.entries
    digest = (found.record.base_fingerprint or {}).get("sha256")
    values = {path: found.tensors[path]["fps_values"] for path in entries}
    calibration = found.record.calibration
    settings = found.settings | _flat(None if calibration is None else calibration.to_json())
    return Side(name, entries, values, settings, digest, found.file_bytes)


def compare(first: Side, second: Side) -> Comparison:
    """Compare two sides; modules that only one has are taken to be without entries in the other.

    Raises:
        ValueError: a module that both have is of another shape, or they have none in common.
    """
    common = [path for path in first.entries if path in second.entries]
    if not common:
        raise ValueError(
            f"{first.name} and {second.name} have no module in common, expected adapters or selections of one base "
            f"model: found {next(iter(first.entries), 'none')} and {next(iter(second.entries), 'none')}."
        )
    one, other = ({path: side.entries[path] for path in common} for side in (first, second))
    theirs, ours = ({path: module.shape for path, module in entries.items()} for entries in (other, one))
    check_same_modules(theirs, ours, second.name, first.name, "Compare adapters or selections of one base model.")
    paths = list(dict.fromkeys([*first.entries, *second.entries]))
    nothing = torch.zeros(0, dtype=torch.int64)
    positions = [
        {path: side.entries[path].positions() if path in side.entries else nothing for path in paths}
        for side in (first, second)
    ]
    overlap = measure_overlap(*positions)
    rows, pairs = [], []
    for path in paths:
        here, there = positions[0][path], positions[1][path]
        in_second, in_first = torch.isin(here, there), torch.isin(there, here)
        shared = int(in_second.sum())
        values = None
        if first.values is not None and second.values is not None:
            empty = torch.zeros(0)
            pair = first.values.get(path, empty)[in_second], second.values.get(path, empty)[in_first]
            values = _compare_values(*pair)
            pairs.append(pair)
        sizes = (len(here), len(there), shared, len(here) + len(there) - shared)
        rows.append(ModuleComparison(path, *sizes, overlap.modules[path], values))
    total = _compare_values(*map(torch.cat, zip(*pairs, strict=True))) if pairs else None
    return Comparison(first, second, tuple(rows), overlap, total, _differences(first, second))


def _compare_values(first: Tensor, second: Tensor) -> Values:
    """Compare values at the same entries, both `(shared entries,)`."""
    if not first.numel():
        return Values(0, None, None, None, None)
    first, second = first.double(), second.double()
    difference = (first - second).abs()
    return Values(
        shared=first.numel(),
        mean_difference=float(difference.mean()),
        largest_difference=float(difference.max()),
        mean_size=float((first.abs() + second.abs()).mean() / 2),
        same_sign=float((first.sign() == second.sign()).double().mean()),
    )


def _differences(first: Side, second: Side) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ; between an adapter and a selection, only those that both have."""
    names = dict.fromkeys([*first.settings, *second.settings])
    if (first.values is None) != (second.values is None):
        names = {name: None for name in names if name in first.settings and name in second.settings}
    pairs = {name: (first.settings.get(name), second.settings.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _flat(record: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a calibration record as settings. What repeats the config's is left out."""
    kept = ("examples", "batches", "combination", "adapters")
    return {f"calibration.{key}": value for key, value in (record or {}).items() if key in kept}
