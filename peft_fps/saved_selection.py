"""A selection on its own: which entries of which modules, apart from any model and from trained values.

It can be taken from an adapter, given to another one, kept in a file, and compared with another selection.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from peft import PeftConfig
from peft.utils import CONFIG_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from peft_fps.adapters import AdapterState
from peft_fps.checkpoint import PEFT_PREFIX, REMEDY, WEIGHTS, encode
from peft_fps.checks import check_allocation
from peft_fps.config import FPSConfig
from peft_fps.lookup import active_adapter, adapter_config, adapter_layers, base_model
from peft_fps.renames import current_names
from peft_fps.selecting import check_selectable, selection_report
from peft_fps.selection import SelectionReport
from peft_fps.sparse import StructureError, check_entries


FILE_VERSION = 1
METADATA = "peft_fps_selection"
"""The one key of a file's metadata, so that equal selections give equal bytes: safetensors does not order keys."""

INDICES = ("fps_columns", "fps_row_counts")


@dataclass(frozen=True, eq=False)
class ModuleEntries:
    """The selected entries of one module, whose weight is seen as `(neurons, inputs)`.

    Attributes:
        columns: `(nnz,)` int32, strictly increasing within a neuron. Integers of any dtype and device are taken and
            copied, like the row counts.
        row_counts: `(neurons,)` int32, entries of each neuron.
        inputs: fan-in.

    Raises:
        TypeError: the fan-in is no integer.
        ValueError: the fan-in is out of range, or the tensors do not form a selection.
    """

    columns: Tensor
    row_counts: Tensor
    inputs: int

    def __post_init__(self) -> None:
        if isinstance(self.inputs, bool) or not isinstance(self.inputs, int):
            raise TypeError(f"inputs is {self.inputs!r} of type {type(self.inputs).__name__}, expected an integer")
        if not 0 < self.inputs <= 2**31:
            raise StructureError(f"inputs is {self.inputs}, expected a fan-in between 1 and 2**31")
        neurons = self.row_counts.numel()
        for name, tensor in zip(
            ("columns", "row_counts"), check_entries(self.columns, self.row_counts, neurons, self.inputs), strict=True
        ):
            object.__setattr__(self, name, tensor.to("cpu", torch.int32))

    @property
    def neurons(self) -> int:
        """Rows of the weight."""
        return self.row_counts.numel()

    @property
    def entries(self) -> int:
        """Selected entries."""
        return self.columns.numel()

    def positions(self) -> Tensor:
        """Return where the entries lie in the flattened `(neurons, inputs)`: `(nnz,)` int64, increasing."""
        return torch.repeat_interleave(self.row_counts.long()) * self.inputs + self.columns

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ModuleEntries):
            return NotImplemented
        same = self.inputs == other.inputs and torch.equal(self.row_counts, other.row_counts)
        return same and torch.equal(self.columns, other.columns)


@dataclass(frozen=True)
class Overlap:
    """How far two selections agree: Jaccard index |A ∩ B| / |A ∪ B| of their entries; `str()` gives a table.

    Two empty sets agree: their index is 1. TR-PTS (arXiv 2507.22872) compares tasks by it.

    Attributes:
        total: of all entries.
        modules: of each module's entries, by module path.
        blocks: of the entries of each transformer block: all modules whose paths agree up to the first number
            (`vit.layers.0`). Modules outside any block, such as a patch embedding, are in none.
    """

    total: float
    modules: dict[str, float]
    blocks: dict[str, float]

    def __str__(self) -> str:
        parts = [{"module": "overlap"}]
        parts += [
            {name: f"{index:.4f}" for name, index in part.items()}
            for part in (self.modules, self.blocks, {"total": self.total})
        ]
        width = max(len(name) for part in parts for name in part)
        lines = [
            "\n".join(f"{name.ljust(width)}  {cell.rjust(len('overlap'))}" for name, cell in part.items())
            for part in parts
            if part
        ]
        return f"\n{'-' * (width + 2 + len('overlap'))}\n".join(lines)


@dataclass(frozen=True, eq=False, repr=False)
class Selection:
    """Which entries of which modules are selected, without their trained values.

    Attributes:
        modules: the entries of each module, by its path in the base model.
        method: how they were chosen, as plain data, None where unknown: `importance`, `granularity`, `calibration`
            (the record that `calibrate` makes) and `base_fingerprint` (of the base model they were chosen on). Copied.

    Raises:
        TypeError, ValueError: the method is not plain data, or its records are not of their form.
    """

    modules: dict[str, ModuleEntries]
    method: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "modules", dict(self.modules))
        object.__setattr__(self, "method", _plain(self.method))

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

    # --- adapters -----------------------------------------------------------------------------------------------

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
        config, layers, modules = adapter_config(model, name), adapter_layers(model, name), {}
        for path, layer in layers.items():
            if layer.awaits_loading(name):
                raise ValueError(
                    f"{path}: the tensors of adapter {name!r} are not loaded, expected selected entries. Load an "
                    "adapter file, or select entries with model.calibrate(...), before taking the selection."
                )
        for path, layer in layers.items():
            tensors = layer.fps_columns[name], layer.fps_row_counts[name]
            where = f"{path}: adapter {name!r}"
            modules[path] = _checked(where, tensors, layer.shape.neurons, layer.shape.inputs)
        return cls(modules, _method(config, next(iter(layers.values())).fps_state[name]))

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
        if not isinstance(config, FPSConfig) or config.allocation is None:
            raise ValueError(f"{folder} holds a {type(config).__name__} without saved entries, expected an FPSConfig.")
        _, held = _tensors(folder / WEIGHTS, ending=INDICES)
        tensors = {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in held.items()}
        modules = _checked_modules(folder / WEIGHTS, tensors, config.allocation)
        state = AdapterState(selected=True, calibration=config.calibration, base_fingerprint=config.base_fingerprint)
        return cls(modules, _method(config, state))

    def apply(
        self, model: nn.Module, adapter_name: str | None = None, *, discard_values: bool = False
    ) -> SelectionReport:
        """Give an adapter these entries with zero changes, instead of those it has.

        The numbers of entries per module may be others than the adapter had, as long as its budget is kept; an
        adapter that was configured by `per_neuron` has no limit. Modules that transformers has renamed since are
        found under their present names. The base model may be another one than the selection was made on.

        Args:
            model: a model with an FPS adapter: a `PeftModel`, or a transformers model after `add_adapter`.
            adapter_name: the active adapter if None.
            discard_values: allow it although training has begun; the learned changes are lost.

        Returns:
            What is selected now; prints as a table.

        Raises:
            ValueError: the adapter has other modules, a budget too small, trained changes, is merged or not loaded.
                The model is unchanged then.
        """
        name = adapter_name or active_adapter(model)
        config, layers = adapter_config(model, name), adapter_layers(model, name)
        check_selectable(layers, name, discard_values)
        modules = current_names(base_model(model), self.modules)
        _check_same(
            {path: (module.neurons, module.inputs) for path, module in modules.items()},
            {path: (layer.shape.neurons, layer.shape.inputs) for path, layer in layers.items()},
            "the selection",
            f"adapter {name!r}",
            "Apply the selection to an adapter with the target_modules and the base model that it was made with. "
            "Nothing was changed.",
        )
        _check_budget(self.entries, config, selection_report(model, name), name)
        calibration = _plain(self.method).get("calibration")
        for path, module in modules.items():
            layers[path].set_selection(name, module.columns, module.row_counts)
        state = next(iter(layers.values())).fps_state[name]
        state.selected, state.calibration = True, calibration
        return selection_report(model, name)

    # --- files --------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the selection to one safetensors file; another file of that name is replaced only when all is written.

        Equal selections with their modules in the same order give the same bytes.

        Args:
            path: name of the file; missing folders are made.
        """
        tensors, sizes = {}, {}
        for module_path, module in self.modules.items():
            sizes[module_path] = {"neurons": module.neurons, "inputs": module.inputs, "entries": module.entries}
            for name, tensor in zip(INDICES, (module.columns, module.row_counts), strict=True):
                tensors[f"{module_path}.{name}"] = encode(name, tensor, module.inputs).clone()
        record = {"format_version": FILE_VERSION, "allocation": sizes, "method": self.method}
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid4().hex}")
        try:
            temporary.write_bytes(save(tensors, {METADATA: json.dumps(record, allow_nan=False)}))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Selection":
        """Read a selection that `save` wrote; everything is checked.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, no selection, or written by a newer version.
        """
        metadata, tensors = _tensors(Path(path))
        record = _record(path, metadata)
        modules = _checked_modules(path, tensors, record["allocation"])
        try:
            return cls(modules, record["method"])
        except ValueError as error:
            raise ValueError(f"{path}: {error} {REMEDY}") from error

    # --- comparison ---------------------------------------------------------------------------------------------

    def overlap(self, other: "Selection") -> Overlap:
        """Compare with a selection of the same modules, say for another task.

        Raises:
            ValueError: the selections are of different modules; names one of them.
        """
        _check_same(
            {path: (module.neurons, module.inputs) for path, module in other.modules.items()},
            {path: (module.neurons, module.inputs) for path, module in self.modules.items()},
            "the other selection",
            "this selection",
            "Compare selections of one base model with the same target_modules.",
        )
        common = {
            path: int(torch.isin(module.positions(), other.modules[path].positions(), assume_unique=True).sum())
            for path, module in self.modules.items()
        }
        blocks: dict[str, list[str]] = {}
        for path in self.modules:
            block = _block(path)
            if block is not None:
                blocks.setdefault(block, []).append(path)

        def jaccard(paths: list[str]) -> float:
            both = sum(common[path] for path in paths)
            either = sum(self.modules[path].entries + other.modules[path].entries for path in paths) - both
            return both / either if either else 1.0

        return Overlap(
            total=jaccard(list(common)),
            modules={path: jaccard([path]) for path in common},
            blocks={block: jaccard(paths) for block, paths in blocks.items()},
        )


def _method(config: FPSConfig, state: AdapterState) -> dict[str, Any]:
    """How an adapter's entries were chosen, from what its config and state tell."""
    record = state.calibration
    # a config with init_weights=False selects at random; one that was loaded uncalibrated tells nothing
    if record is None and config.init_weights and not (config.needs_calibration and state.selected):
        importance = "magnitude" if config.needs_calibration else config.importance
        record = {"importance": importance, **{key: getattr(config, key) for key in ("order", "granularity", "seed")}}
    chosen = {key: None if record is None else record.get(key) for key in ("importance", "granularity")}
    return {**chosen, "calibration": record, "base_fingerprint": state.base_fingerprint}


def _plain(method: Any) -> dict[str, Any]:
    """Return a deep copy of a method record as JSON holds it, checked as far as this package relies on it."""
    advice = "expected a dict of plain data: strings, finite numbers, True, False, None, and lists and dicts of them."
    if not isinstance(method, dict):
        raise TypeError(f"method is {method!r} of type {type(method).__name__}, {advice}")
    try:
        plain: dict[str, Any] = json.loads(json.dumps(method, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"method cannot be written as JSON: {error}; {advice}") from error
    record, digest = plain.get("calibration"), plain.get("base_fingerprint")
    examples = record.get("examples", 0) if isinstance(record, dict) else 0
    if not isinstance(record, dict | None) or isinstance(examples, bool) or not isinstance(examples, int):
        raise ValueError(f"method has calibration={record!r}, expected None or a dict whose 'examples' is an integer.")
    strings = isinstance(digest, dict) and all(isinstance(digest.get(key), str) for key in ("sha256", "dtype"))
    if digest is not None and not strings:
        raise ValueError(f"method has base_fingerprint={digest!r}, expected None or a dict with 'sha256' and 'dtype'.")
    return plain


def _checked(where: str, tensors: tuple[Tensor, Tensor], neurons: int, inputs: int) -> ModuleEntries:
    """Build the entries of one module from columns `(nnz,)` and row counts `(neurons,)` of whatever origin."""
    try:
        check_entries(*tensors, neurons, inputs)
        return ModuleEntries(*tensors, inputs)
    except StructureError as error:
        raise ValueError(f"{where}: {error}. Its tensors are damaged or incomplete; load an intact file.") from error


def _tensors(path: Path, ending: str | tuple[str, ...] = "") -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return the metadata of a safetensors file, and its tensors whose names end so."""
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.endswith(ending)]  # noqa: SIM118 - not a mapping
            return file.metadata() or {}, {name: file.get_tensor(name) for name in names}
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}. {REMEDY}") from error


def _checked_modules(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], allocation: Any
) -> dict[str, ModuleEntries]:
    """Build the entries of all modules from a file's tensors.

    Args:
        path: the file, for messages.
        tensors: what it holds under `<module path>.fps_columns` and `<module path>.fps_row_counts`.
        allocation: neurons, inputs and entries by module path, as its record says.
    """
    try:
        check_allocation(allocation)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error} {REMEDY}") from error
    expected = {f"{name}.{index}" for name in allocation for index in INDICES}
    if set(tensors) != expected:
        missing, unknown = sorted(expected - set(tensors)), sorted(set(tensors) - expected)
        raise ValueError(
            f"{path}: lacks the tensors {missing} and holds {unknown} besides, expected {' and '.join(INDICES)} of "
            f"each of {len(allocation)} modules. {REMEDY}"
        )
    modules = {}
    for name, sizes in allocation.items():
        columns, row_counts = (tensors[f"{name}.{index}"] for index in INDICES)
        module = _checked(f"{path}: {name}", (columns, row_counts), sizes["neurons"], sizes["inputs"])
        checked = dict(zip(INDICES, (module.columns, module.row_counts), strict=True))
        for index, found in zip(INDICES, (columns, row_counts), strict=True):
            wanted = encode(index, checked[index], module.inputs).dtype
            if found.dtype != wanted:
                raise ValueError(f"{path}: {name}: {index} has dtype {found.dtype}, expected {wanted}. {REMEDY}")
        if module.entries != sizes["entries"]:
            raise ValueError(
                f"{path}: {name}: found {module.entries} entries, expected {sizes['entries']} as the file's record "
                f"says. {REMEDY}"
            )
        modules[name] = module
    return modules


def _record(where: str | os.PathLike[str], metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the record in a selection file's metadata."""
    text = metadata.get(METADATA)
    if text is None:
        raise ValueError(
            f"{where}: found no {METADATA!r} in its metadata, expected a file that Selection.save has written. For an "
            "adapter use Selection.from_adapter(folder)."
        )
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: its record is not valid JSON ({error}), expected an object. {REMEDY}") from error
    version = record.get("format_version") if isinstance(record, dict) else None
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ValueError(f"{where}: format_version is {version!r}, expected an integer of at least 1. {REMEDY}")
    if version > FILE_VERSION:
        raise ValueError(
            f"{where}: format_version is {version}, expected at most {FILE_VERSION}: the selection was written by a "
            "newer peft_fps. Upgrade with `pip install -U peft-fps`."
        )
    if not all(isinstance(record.get(key), dict) for key in ("allocation", "method")):
        raise ValueError(
            f"{where}: its record holds {sorted(record)}, expected the objects 'allocation' and 'method'. {REMEDY}"
        )
    return record


def _check_same(
    found: Mapping[str, tuple[int, int]], expected: Mapping[str, tuple[int, int]], given: str, whose: str, remedy: str
) -> None:
    """Raise ValueError unless both, called `given` and `whose`, have the same modules, neurons and fan-ins."""
    for path in [*expected, *found]:
        if path not in found:
            raise ValueError(f"{path}: not in {given}, expected all {len(expected)} modules of {whose}. {remedy}")
        if path not in expected:
            raise ValueError(f"{path}: in {given}, expected the {len(expected)} modules of {whose} alone. {remedy}")
        if found[path] != expected[path]:
            raise ValueError(
                f"{path}: found {found[path][0]} neurons with {found[path][1]} inputs in {given}, expected "
                f"{expected[path][0]} with {expected[path][1]} as in {whose}. {remedy}"
            )


def _check_budget(entries: int, config: FPSConfig, report: SelectionReport, name: str) -> None:
    """Raise ValueError if so many entries and the adapter's bias deltas together exceed its budget."""
    if config.budget is None:
        return
    # the decimal number that the user wrote; a budget of 0 trains the biases, and they do not count
    limit = int(Fraction(str(config.budget)) * report.base_parameters) if config.budget else report.biases
    if entries + report.biases > limit:
        raise ValueError(
            f"adapter {name!r}: the selection has {entries:,} entries, which with {report.biases:,} bias deltas train "
            f"{entries + report.biases:,} parameters, expected at most {limit:,} by budget={config.budget} of "
            f"{report.base_parameters:,}. Add the adapter with a larger budget. Nothing was changed."
        )


def _block(path: str) -> str | None:
    """The path of the block that a module lies in: up to its first number; None if it lies in none."""
    parts = path.split(".")
    depth = next((i for i, part in enumerate(parts[:-1]) if part.isdecimal()), None)
    return None if depth is None else ".".join(parts[: depth + 1])
