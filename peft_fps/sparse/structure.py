"""Where the selected entries of one weight matrix lie.

A selection is a CSR pattern over the weight seen as `(neurons, inputs)`:

    row_counts = [2, 0, 1]             neuron 0: columns 1 and 3
    columns    = [1, 3,      2]        neuron 1: none        (strictly increasing within a neuron)
                                       neuron 2: column 2
"""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor


# A transient product of at most this many elements (16 MiB in float32) is formed at once in backward.
PRODUCT_ELEMENTS = 1 << 22


VALUE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes of trained tensors; the eight-bit ones lack the operators that checks and sums need."""


class StructureError(ValueError):
    """Columns, row counts and values do not describe a valid sparse change of the weight."""


@dataclass(frozen=True)
class RowChunk:
    """A run of neurons whose product is formed at once, and the run of entries that belongs to it."""

    first_row: int
    last_row: int
    first_entry: int
    last_entry: int


@dataclass(frozen=True, eq=False)
class Structure:
    """Index tensors derived once from a selection and used by every forward, backward and merge.

    Attributes:
        neurons: rows of the weight seen as `(neurons, inputs)`.
        inputs: its columns.
        transposed: True where the weight is stored as `(inputs, neurons)` (transformers' `Conv1D`).
        positions: `(nnz,)` where each entry lies in the flattened stored weight; int32 if that suffices, like all
            index tensors of this length.
        rows: `(nnz,)` the neuron of each entry.
        row_starts: `(neurons + 1,)` the first entry of each neuron, and the number of entries.
        union: `(used,)` int64, the sorted inputs that at least one entry reads.
        union_positions: `(nnz,)` where the input of each entry lies in `union`.
        chunks: row chunks, each with a product of at most `PRODUCT_ELEMENTS` elements (or a single row).
        shared: index tensors derived for sharing kept columns with other readers of an input, see `keeping`.
    """

    neurons: int
    inputs: int
    transposed: bool
    positions: Tensor
    rows: Tensor
    row_starts: Tensor
    union: Tensor
    union_positions: Tensor
    chunks: tuple[RowChunk, ...]
    shared: dict[tuple[int, ...], tuple[list[Tensor], Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @cached_property
    def by_column(self) -> tuple[Tensor, Tensor, Tensor]:
        """The entries in the order of their inputs (CSC).

        Returns:
            `(nnz,)` their places in the order of the neurons, `(nnz,)` their neurons, and `(inputs,)` the first entry
            of each input.
        """
        with torch.inference_mode(False):  # what is derived during inference must serve training later
            order = torch.argsort(self.union_positions, stable=True)
            columns = self.union.index_select(0, self.union_positions.index_select(0, order))
            starts = torch.searchsorted(columns, torch.arange(self.inputs, device=columns.device))
            small = self.rows.dtype
            return order.to(small), self.rows.index_select(0, order), starts.to(small)


def even_row_counts(entries: int, neurons: int) -> Tensor:
    """Spread `entries` over `neurons` as evenly as possible, the surplus to the first ones; `(neurons,)` int32."""
    counts = torch.full((neurons,), entries // neurons, dtype=torch.int32, device="cpu")
    counts[: entries % neurons] += 1
    return counts


def check_floating(name: str, tensor: Tensor, shape: torch.Size) -> None:
    """Raise StructureError unless a trained tensor has a fitting dtype and the given shape."""
    if tensor.dtype not in VALUE_DTYPES:
        raise StructureError(f"{name} has dtype {tensor.dtype}, expected a floating dtype of 16 to 64 bits")
    if tensor.shape != shape:
        raise StructureError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise StructureError if a trained tensor holds NaN or infinity."""
    # detached: a check must leave nothing in the graph, or recomputation under checkpointing would differ
    if not bool(torch.isfinite(tensor.detach()).all()):
        raise StructureError(f"{name} contains NaN or infinity, expected finite values")


def check_entries(
    columns: Tensor, row_counts: Tensor, neurons: int, inputs: int, values: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Check that tensors from anywhere form a valid selection, before anything is indexed with them.

    Args:
        columns: `(nnz,)` integers.
        row_counts: `(neurons,)` integers.
        neurons: number of neurons of the layer (from the model, never from a file).
        inputs: fan-in of the layer (likewise).
        values: `(nnz,)` floating, optional.

    Returns:
        `columns` and `row_counts` as int64, for use by the caller.

    Raises:
        StructureError: wrong dtype, shape, range or order, or values that are not finite; says found and expected.
    """
    for name, tensor in (("fps_columns", columns), ("fps_row_counts", row_counts)):
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            raise StructureError(f"{name} has dtype {tensor.dtype}, expected an integer dtype")
        if tensor.dim() != 1:
            raise StructureError(f"{name} has shape {tuple(tensor.shape)}, expected one dimension")
    if row_counts.numel() != neurons:
        raise StructureError(f"fps_row_counts has {row_counts.numel()} elements, expected one per neuron, {neurons}")
    # int64 before any comparison: torch's small unsigned types lack most operators, and narrowing casts wrap silently
    columns, row_counts = columns.to(torch.int64), row_counts.to(torch.int64)
    if neurons and (int(row_counts.min()) < 0 or int(row_counts.max()) > inputs):
        raise StructureError(
            f"fps_row_counts ranges over [{int(row_counts.min())}, {int(row_counts.max())}], expected [0, {inputs}]"
        )
    total = int(row_counts.sum())
    if columns.numel() != total:
        raise StructureError(
            f"fps_columns has {columns.numel()} elements, expected the sum of fps_row_counts, {total}"
        )
    if values is not None:
        check_floating("fps_values", values, columns.shape)
    if total:
        low, high = int(columns.min()), int(columns.max())
        if low < 0 or high >= inputs:
            raise StructureError(f"fps_columns ranges over [{low}, {high}], expected [0, {inputs - 1}]")
        rows = torch.repeat_interleave(row_counts)
        unordered = (columns[1:] <= columns[:-1]) & (rows[1:] == rows[:-1])
        if bool(unordered.any()):
            row = int(rows[1:][unordered][0])
            raise StructureError(
                f"fps_columns is not strictly increasing within neuron {row}, expected sorted, unique"
            )
    if values is not None:
        check_finite("fps_values", values)
    return columns, row_counts


def build_structure(
    columns: Tensor, row_counts: Tensor, neurons: int, inputs: int, transposed: bool = False
) -> Structure:
    """Derive the index tensors of `Structure` from valid columns `(nnz,)` and row counts `(neurons,)`.

    Raises:
        StructureError: as `check_entries`.
    """
    columns, row_counts = check_entries(columns, row_counts, neurons, inputs)
    rows = torch.repeat_interleave(row_counts)
    union, union_positions = torch.unique(columns, return_inverse=True)
    used = max(int(union.numel()), 1)

    rows_per_chunk = max(PRODUCT_ELEMENTS // used, 1)
    starts = list(range(0, neurons, rows_per_chunk))
    ends = [min(start + rows_per_chunk, neurons) for start in starts]
    offsets = torch.cat([row_counts.new_zeros(1), row_counts.cumsum(0)])
    bounds = offsets[torch.tensor([*starts, neurons], device=offsets.device)].tolist()
    chunks = tuple(RowChunk(*chunk) for chunk in zip(starts, ends, bounds[:-1], bounds[1:], strict=True))

    small = torch.int32 if neurons * inputs < 2**31 else torch.int64
    positions = columns * neurons + rows if transposed else rows * inputs + columns
    return Structure(
        neurons=neurons,
        inputs=inputs,
        transposed=transposed,
        positions=positions.to(small),
        rows=rows.to(small),
        row_starts=offsets.to(small),
        union=union,
        union_positions=union_positions.to(small),
        chunks=chunks,
    )


def unite_structures(structures: list[Structure]) -> tuple[Structure, Tensor]:
    """Return the union of several structures of one layer, and where each of their entries went.

    Returns:
        The united structure, and `(sum of all nnz,)` int64: for every entry of the given structures, in order, its
        place among the united entries.
    """
    first = structures[0]
    stored = torch.cat([structure.positions for structure in structures]).to(torch.int64)
    if first.transposed:
        stored = stored % first.neurons * first.inputs + stored // first.neurons
    entries, places = torch.unique(stored, return_inverse=True)
    row_counts = torch.bincount(entries // first.inputs, minlength=first.neurons)
    columns = entries % first.inputs
    return build_structure(columns, row_counts, first.neurons, first.inputs, first.transposed), places
