"""A selection in a safetensors file: columns and row counts of every module, and a record in the metadata.

| tensor | shape | dtype |
|---|---|---|
| `<module path>.fps_columns` | `(nnz,)` | as in an adapter file, see `encoding` |
| `<module path>.fps_row_counts` | `(neurons,)` | as in an adapter file |

Everything is checked before it is returned. An adapter file holds the same tensors among others.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors.torch import save
from torch import Tensor

from peft_fps.checkpoint.contents import Contents
from peft_fps.checkpoint.encoding import encode
from peft_fps.checkpoint.record import SavedSizes, allocation_from_json, allocation_to_json
from peft_fps.checkpoint.safetensors_file import FILE_REMEDY, open_safetensors
from peft_fps.selection.entries import ModuleEntries
from peft_fps.selection.module_sizes import ModuleSizes
from peft_fps.sparse import StructureError


FILE_VERSION = 1
METADATA = "peft_fps_selection"
"""The only key of the metadata: safetensors does not order keys, and equal selections are to give equal bytes."""

INDICES = ("fps_columns", "fps_row_counts")


def write_selection(path: Path, modules: Mapping[str, ModuleEntries], method: Mapping[str, Any]) -> None:
    """Write a selection. An old file of that name is replaced only when the new one is complete.

    Args:
        path: of the file; missing folders are created.
        modules: the entries of each module, by module path.
        method: how they were chosen; plain data that JSON can hold.
    """
    tensors, sizes = {}, {}
    for module, held in modules.items():
        sizes[module] = ModuleSizes(held.neurons, held.inputs, held.entries)
        for name, tensor in zip(INDICES, (held.columns, held.row_counts), strict=True):
            tensors[f"{module}.{name}"] = encode(name, tensor, held.inputs).clone()
    record = {"format_version": FILE_VERSION, "allocation": allocation_to_json(sizes), "method": method}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        temporary.write_bytes(save(tensors, {METADATA: json.dumps(record, allow_nan=False)}))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_selection(path: Path) -> tuple[dict[str, ModuleEntries], dict[str, Any]]:
    """Read a file that `write_selection` wrote.

    Args:
        path: of the file.

    Returns:
        The entries of each module by module path, and the method. The content of the method is not checked.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, is not a selection, or was written by a newer version.
    """
    metadata, tensors = _read(path)
    record = _checked_record(path, metadata)
    try:
        allocation = allocation_from_json(record["allocation"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error} {FILE_REMEDY}") from error
    return _checked_modules(path, tensors, allocation), record["method"]


def read_adapter(path: Path, allocation: SavedSizes) -> dict[str, ModuleEntries]:
    """Read the selection of an adapter file, without norms, of which only a bias is trained.

    Args:
        path: of the file.
        allocation: sizes of every module, from the adapter's record.

    Returns:
        The entries of each module, by module path.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or does not fit the config.
    """
    _, keyed = _read(path, ending=INDICES)
    try:
        contents = Contents.of(keyed.items())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    tensors = dict(contents.wholes)  # keys that only end like those of a module
    for module, indices in contents.modules.items():
        tensors |= {f"{module}.{name}": tensor for name, tensor in indices.items()}
    weights = {module: sizes for module, sizes in allocation.items() if not sizes.is_norm}
    for module in allocation.keys() - weights.keys():
        for name in INDICES:
            tensors.pop(f"{module}.{name}", None)
    return _checked_modules(path, tensors, weights)


def _read(path: Path, ending: str | tuple[str, ...] = "") -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return the metadata of a safetensors file, and the tensors whose keys end in `ending`."""
    with open_safetensors(path) as file:
        keys = [key for key in file.keys() if key.endswith(ending)]  # noqa: SIM118 - not a mapping
        return file.metadata() or {}, {key: file.get_tensor(key) for key in keys}


def _checked_modules(path: Path, tensors: Mapping[str, Tensor], allocation: SavedSizes) -> dict[str, ModuleEntries]:
    """Check a file's tensors against the sizes in the allocation, and return the entries of each module."""
    expected = {f"{module}.{name}" for module in allocation for name in INDICES}
    if set(tensors) != expected:
        missing, unknown = sorted(expected - set(tensors)), sorted(set(tensors) - expected)
        raise ValueError(
            f"{path}: lacks the tensors {missing} and holds {unknown} besides, expected {' and '.join(INDICES)} of "
            f"each of {len(allocation)} modules. {FILE_REMEDY}"
        )
    modules = {}
    for module, sizes in allocation.items():
        columns, row_counts = (tensors[f"{module}.{name}"] for name in INDICES)
        try:
            modules[module] = _checked_module(columns, row_counts, sizes)
        except StructureError as error:
            raise ValueError(f"{path}: {module}: {error}. {FILE_REMEDY}") from error
    return modules


def _checked_module(columns: Tensor, row_counts: Tensor, sizes: ModuleSizes) -> ModuleEntries:
    """Return the entries of one module.

    Args:
        columns: as they are in the file.
        row_counts: as they are in the file.
        sizes: of the module, from the record.

    Raises:
        StructureError: the tensors form no selection of this size, have other dtypes than `encode` gives, or hold
            another number of entries.
    """
    checked = ModuleEntries.of_size(columns, row_counts, sizes.neurons, sizes.inputs)
    for name, found, right in zip(INDICES, (columns, row_counts), (checked.columns, checked.row_counts), strict=True):
        wanted = encode(name, right, sizes.inputs).dtype
        if found.dtype != wanted:
            raise StructureError(f"{name} has dtype {found.dtype}, expected {wanted}")
    if checked.entries != sizes.entries:
        raise StructureError(f"found {checked.entries} entries, expected {sizes.entries} as the file's record says")
    return checked


def _checked_record(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Check and return the record in a selection file's metadata."""
    text = metadata.get(METADATA)
    if text is None:
        raise ValueError(
            f"{path}: found no {METADATA!r} in its metadata, expected a file that Selection.save has written. For an "
            "adapter use Selection.from_adapter(folder)."
        )
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: its record is not valid JSON ({error}), expected an object. {FILE_REMEDY}"
        ) from error
    version = record.get("format_version") if isinstance(record, dict) else None
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ValueError(f"{path}: format_version is {version!r}, expected an integer of at least 1. {FILE_REMEDY}")
    if version > FILE_VERSION:
        raise ValueError(
            f"{path}: format_version is {version}, expected at most {FILE_VERSION}: the selection was written by a "
            "newer peft_fps. Upgrade with `pip install -U peft-fps`."
        )
    if not all(isinstance(record.get(key), dict) for key in ("allocation", "method")):
        raise ValueError(
            f"{path}: its record holds {sorted(record)}, expected the objects 'allocation' and 'method'. {FILE_REMEDY}"
        )
    return record
