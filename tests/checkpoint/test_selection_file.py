"""Selections on disk: given back as they were, and every damage is refused by name."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from peft_fps.checkpoint.record import ModuleSizes
from peft_fps.checkpoint.selection_file import read_adapter, read_selection, write_selection
from peft_fps.selection.entries import ModuleEntries
from tests.support.helpers import PLAIN, csr, selections


Rows = list[list[int]]


def two_modules() -> dict[str, ModuleEntries]:
    """Two entries in each of the 12 neurons of `first`, fan-in 10, and of the 4 of `last`, fan-in 12."""
    sizes = {"first": (12, 10), "last": (4, 12)}
    return {
        name: ModuleEntries(*csr([sorted({i % inputs, (3 * i + 1) % inputs}) for i in range(1, neurons + 1)]), inputs)
        for name, (neurons, inputs) in sizes.items()
    }


def rows_of(module: ModuleEntries) -> Rows:
    """Columns of every neuron, entry by entry."""
    columns = iter(module.columns.tolist())
    rows = [[next(columns) for _ in range(count)] for count in module.row_counts.tolist()]
    assert next(columns, None) is None
    return rows


# --- there and back -------------------------------------------------------------------------------------------------


@given(
    st.dictionaries(st.sampled_from(["stem", "a.0.x", "a.1.x", "größe"]), selections()),
    st.dictionaries(st.sampled_from(["importance", "note", "größe"]), PLAIN),
)
def test_reading_a_written_selection_gives_it_back(
    tmp_path_factory: pytest.TempPathFactory, given_modules: dict[str, tuple[int, Rows]], method: dict[str, Any]
):
    path = tmp_path_factory.mktemp("selection") / "sub" / "one.safetensors"
    modules = {name: ModuleEntries(*csr(rows), inputs) for name, (inputs, rows) in given_modules.items()}
    write_selection(path, modules, method)
    found, found_method = read_selection(path)
    assert list(found) == list(given_modules)
    assert {name: (module.inputs, rows_of(module)) for name, module in found.items()} == given_modules
    assert found_method == method


@pytest.mark.parametrize(
    ("inputs", "per_neuron", "column_bytes", "count_bytes"),
    [(300, 255, 2, 1), (300, 256, 2, 2), (65536, 2, 2, 1), (65537, 2, 4, 1), (70000, 65536, 4, 4)],
)
def test_files_are_as_small_as_adapters_are(
    inputs: int, per_neuron: int, column_bytes: int, count_bytes: int, tmp_path: Path
):
    row = list(range(inputs - per_neuron, inputs))
    modules = {"a": ModuleEntries(*csr([row, row]), inputs)}
    write_selection(tmp_path / "s", modules, {})
    tensors = load_file(tmp_path / "s")
    assert {name: tensor.element_size() for name, tensor in tensors.items()} == {
        "a.fps_columns": column_bytes,
        "a.fps_row_counts": count_bytes,
    }
    assert read_selection(tmp_path / "s") == (modules, {})


def test_modules_that_share_tensors_are_saved(tmp_path: Path):
    module = ModuleEntries(torch.tensor([70_000]), torch.tensor([1]), 70_001)
    write_selection(tmp_path / "s", {"a": module, "b": module}, {})
    assert read_selection(tmp_path / "s") == ({"a": module, "b": module}, {})


def test_equal_selections_give_equal_bytes(tmp_path: Path):
    for name in ("one", "two"):
        write_selection(tmp_path / name, two_modules(), {"importance": "magnitude", "order": "top"})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "s"
    first, second = ({"a": ModuleEntries(*csr(rows), 4)} for rows in ([[0]], [[1, 2]]))
    write_selection(path, first, {})

    def fails(source: Any, target: Any) -> None:
        assert Path(source).parent == tmp_path
        assert read_selection(Path(source)) == (second, {})  # all is written before anything is replaced
        raise OSError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fails)
        with pytest.raises(OSError, match="no space"):
            write_selection(path, second, {})
    assert os.listdir(tmp_path) == ["s"]
    assert read_selection(path) == (first, {})
    write_selection(path, second, {})
    assert read_selection(path) == (second, {})
    assert os.listdir(tmp_path) == ["s"]


METADATA = "peft_fps_selection"


def _edit(
    tensors: Callable[[dict[str, Tensor]], Any] | None = None, record: Callable[[Any], Any] | None = None
) -> Any:
    """Change what a file holds, or the record in its metadata."""

    def change(path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads(file.metadata()[METADATA])
        held = load_file(path)
        path.unlink()
        if tensors:
            tensors(held)
        if record:
            record(metadata)
        save_file(held, path, {METADATA: json.dumps(metadata)})

    return change


def _tensor(name: str, edit: Callable[[Tensor], Tensor]) -> Any:
    return _edit(lambda held: held.update({name: edit(held[name]).contiguous()}))


def _cast(name: str, dtype: torch.dtype, expected: str) -> tuple[Any, str]:
    says = f"last: {name} has dtype {dtype}, expected {expected}"
    return _tensor(f"last.{name}", lambda tensor: tensor.to(torch.float32).to(dtype)), says


def _put(name: str, place: int, element: int) -> Any:
    def edit(tensor: Tensor) -> Tensor:
        wide = tensor.to(torch.int64)
        wide[place] = element
        return wide.to(tensor.dtype)

    return _tensor(name, edit)


def _sizes(**sizes: Any) -> Any:
    return _edit(record=lambda record: record["allocation"]["last"].update(sizes))


def _metadata(**metadata: str) -> Any:
    def change(path: Path) -> None:
        held = load_file(path)
        path.unlink()
        save_file(held, path, metadata or None)

    return change


# of 2 entries in each of the 4 neurons of `last`, fan-in 12, and of the 12 of `first`, fan-in 10
TAMPERINGS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "column out of range": (_put("last.fps_columns", 0, 12), r"last: fps_columns ranges over .* expected \[0, 11\]"),
    "not sorted": (
        _tensor("last.fps_columns", lambda t: t.to(torch.int32).flip(0).to(torch.uint16)),
        "last: fps_columns is not strictly increasing within neuron 0, expected sorted, unique",
    ),
    "repeated": (
        _tensor("first.fps_columns", lambda t: torch.zeros_like(t)),
        "first: fps_columns is not strictly increasing within neuron 0",
    ),
    "count too large": (_put("last.fps_row_counts", 1, 3), "last: fps_columns has 8 elements, expected .* 9"),
    "count above the fan-in": (_put("last.fps_row_counts", 1, 13), r"last: fps_row_counts ranges .* \[0, 12\]"),
    "column missing": (
        _tensor("last.fps_columns", lambda t: t.to(torch.int32)[:-1].to(torch.uint16)),
        "last: fps_columns has 7 elements, expected .* 8",
    ),
    "neuron missing": (
        _tensor("last.fps_row_counts", lambda t: t[:-1]),
        "last: fps_row_counts has 3 elements, expected one per neuron, 4",
    ),
    "matrix": (_tensor("last.fps_columns", lambda t: t.view(2, 4)), r"last: fps_columns has shape \(2, 4\), expected"),
    "scalar": (
        _tensor("last.fps_row_counts", lambda t: t[0].clone()),
        r"last: fps_row_counts has shape \(\), expected one dimension",
    ),
    "float columns": _cast("fps_columns", torch.float32, "an integer"),
    "eight-bit float columns": _cast("fps_columns", torch.float8_e4m3fn, "an integer"),
    "bool counts": _cast("fps_row_counts", torch.bool, "an integer"),
    "wide columns": _cast("fps_columns", torch.int64, "torch.uint16"),
    "wide counts": _cast("fps_row_counts", torch.uint16, "torch.uint8"),
    "no columns": (_edit(lambda held: held.pop("last.fps_columns")), r"lacks the tensors \['last.fps_columns'\]"),
    "no counts": (_edit(lambda held: held.pop("last.fps_row_counts")), r"lacks the tensors \['last.fps_row_counts'\]"),
    "another tensor": (
        _edit(lambda held: held.update(extra=torch.zeros(1))),
        r"holds \['extra'\] besides, expected fps_columns and fps_row_counts of each of 2 modules",
    ),
    "another module": (
        _edit(record=lambda record: record["allocation"].pop("last")),
        r"holds \['last.fps_columns', 'last.fps_row_counts'\] besides",
    ),
    "other fan-in": (_sizes(inputs=9), r"last: fps_columns ranges over .* expected \[0, 8\]"),
    "no fan-in": (_sizes(inputs=0, entries=0), r"last: fps_row_counts ranges over \[2, 2\], expected \[0, 0\]"),
    "huge fan-in": (_sizes(inputs=10**30), r"last: inputs is 10{30}, expected a fan-in between 1 and 2\*\*31"),
    "other neurons": (_sizes(neurons=5), "last: fps_row_counts has 4 elements, expected one per neuron, 5"),
    "other entries": (_sizes(entries=9), "last: found 8 entries, expected 9 as the file's record says"),
    "negative neurons": (_sizes(neurons=-1), "allocation.*expected integers of at least 0"),
    "float fan-in": (_sizes(inputs=12.0), "allocation.*expected integers of at least 0"),
    "size missing": (
        _edit(record=lambda record: record["allocation"]["last"].pop("inputs")),
        "allocation.*expected the integers 'neurons', 'inputs' and 'entries'",
    ),
    "no allocation": (
        _edit(record=lambda record: record.pop("allocation")),
        "expected the objects 'allocation' and 'meth",
    ),
    "allocation null": (
        _edit(record=lambda record: record.update(allocation=None)),
        "expected the objects 'allocation'",
    ),
    "no method": (_edit(record=lambda record: record.pop("method")), "expected the objects 'allocation' and 'method'"),
    "newer version": (
        _edit(record=lambda record: record.update(format_version=2)),
        "format_version is 2, expected at most 1: .* newer peft_fps. Upgrade with `pip install -U peft-fps`",
    ),
    "no version": (
        _edit(record=lambda record: record.pop("format_version")),
        "format_version is None, expected an integer",
    ),
    "version true": (
        _edit(record=lambda record: record.update(format_version=True)),
        "format_version is True, expected",
    ),
    "version 0": (
        _edit(record=lambda record: record.update(format_version=0)),
        "format_version is 0, expected an integer",
    ),
    "record a list": (_metadata(**{METADATA: "[]"}), "format_version is None"),
    "record no JSON": (_metadata(**{METADATA: "{"}), "its record is not valid JSON .*, expected an object"),
    "record too deep": (_metadata(**{METADATA: "[" * 100_000}), "its record is not valid JSON"),
    "other metadata": (_metadata(format="pt"), f"found no '{METADATA}' in its metadata, expected .*from_adapter"),
    "no metadata": (_metadata(), f"found no '{METADATA}' in its metadata"),
    "empty file": (lambda path: path.write_bytes(b""), "not a readable safetensors file"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "not a readable safetensors file"),
    "cut header": (lambda path: path.write_bytes(path.read_bytes()[:40]), "not a readable safetensors file"),
    "text": (lambda path: path.write_text("importance: magnitude"), "not a readable safetensors file"),
    "pickle": (lambda path: torch.save({"a": torch.zeros(1)}, path), "not a readable safetensors file"),
}


@pytest.mark.parametrize("name", TAMPERINGS)
def test_a_damaged_file_is_refused(name: str, tmp_path: Path):
    change, says = TAMPERINGS[name]
    path = tmp_path / "s.safetensors"
    write_selection(path, two_modules(), {})
    change(path)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}.*{says}"):
        read_selection(path)


def test_no_flipped_byte_gives_an_invalid_selection(tmp_path: Path):
    path = tmp_path / "s"
    rows = {"a": [[0, 3], [], [4]], "b": [[1]]}
    write_selection(path, {name: ModuleEntries(*csr(found), 5) for name, found in rows.items()}, {})
    intact = path.read_bytes()
    for place in range(len(intact)):
        for bit in (0, 4, 7):
            path.write_bytes(intact[:place] + bytes([intact[place] ^ 1 << bit]) + intact[place + 1 :])
            try:
                modules, _ = read_selection(path)
            except ValueError:
                continue
            for module in modules.values():
                assert all(
                    row == sorted(set(row)) and set(row) <= set(range(module.inputs)) for row in rows_of(module)
                )


def test_a_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        read_selection(tmp_path / "none")


def test_a_folder_is_no_selection_file(tmp_path: Path):
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        read_selection(tmp_path)


# --- an adapter's file ----------------------------------------------------------------------------------------------


ALLOCATION = {"a.x": ModuleSizes(2, 5, 3), "norm": ModuleSizes(4, 0, 0)}


def adapter_file(path: Path, **changes: Tensor) -> Path:
    """An adapter's tensors, by hand."""
    tensors = {
        "a.x.fps_values": torch.ones(3),
        "a.x.fps_bias": torch.ones(2),
        "a.x.fps_columns": torch.tensor([0, 4, 2]).to(torch.uint16),
        "a.x.fps_row_counts": torch.tensor([2, 1]).to(torch.uint8),
        "norm.fps_values": torch.ones(0),
        "norm.fps_bias": torch.ones(4),
        "norm.fps_columns": torch.zeros(0, dtype=torch.uint16),
        "norm.fps_row_counts": torch.zeros(4, dtype=torch.uint8),
        "classifier.weight": torch.ones(2, 2),
    }
    for name, tensor in changes.items():
        tensors[name.replace("a_x", "a.x", 1).replace("__", ".")] = tensor
    save_file({f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, path, {"format": "pt"})
    return path


def test_the_indices_of_an_adapter_are_read_without_modules_that_have_no_inputs(tmp_path: Path):
    found = read_adapter(adapter_file(tmp_path / "adapter.safetensors"), ALLOCATION)
    assert {name: (module.inputs, rows_of(module)) for name, module in found.items()} == {"a.x": (5, [[0, 4], [2]])}


def test_an_adapter_of_biases_alone_has_no_modules(tmp_path: Path):
    tensors = {"norm.fps_row_counts": torch.zeros(4, dtype=torch.uint8)}
    save_file({f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "a")
    assert read_adapter(tmp_path / "a", {"norm": ALLOCATION["norm"]}) == {}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"a_x__fps_columns": torch.tensor([0, 5, 2]).to(torch.uint16)}, r"a.x: fps_columns ranges over \[0, 5\]"),
        (
            {"a_x__fps_row_counts": torch.tensor([3, 1]).to(torch.uint8)},
            "a.x: fps_columns has 3 elements, expected.* 4",
        ),
        ({"other__fps_columns": torch.zeros(0, dtype=torch.uint16)}, r"holds \['other.fps_columns'\] besides"),
    ],
    ids=["range", "counts", "unknown"],
)
def test_a_damaged_adapter_file_is_refused(changes: dict[str, Tensor], says: str, tmp_path: Path):
    path = adapter_file(tmp_path / "adapter.safetensors", **changes)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: .*{says}"):
        read_adapter(path, ALLOCATION)


@pytest.mark.parametrize("key", ["a.x.fps_columns", "a.x.fps_row_counts"])
def test_an_adapter_file_with_a_second_copy_of_indices_is_refused(key: str, tmp_path: Path):
    path = adapter_file(tmp_path / "adapter.safetensors")
    tensors = load_file(path)
    save_file({**tensors, key: tensors[f"base_model.model.{key}"].clone()}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: a.x: .* holds {key[4:]} twice, expected it once"):
        read_adapter(path, ALLOCATION)
