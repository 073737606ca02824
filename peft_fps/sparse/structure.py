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

from peft_fps.sparse.positions import row_major, stored_positions


# Backward forms a transient product of at most this many elements (16 MiB in float32) at once.
PRODUCT_ELEMENTS = 1 << 22


VALUE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes of trained tensors. Eight-bit dtypes lack the operators that checks and sums need."""


class StructureError(ValueError):
    """Columns, row counts and values do not describe a valid sparse change of the weight."""


@dataclass(frozen=True)
class RowChunk:
    """A run of neurons whose product backward forms at once, and the run of their entries.

    Attributes:
        first_row: first neuron.
        last_row: neuron behind the last one.
        first_entry: first entry of these neurons.
        last_entry: entry behind their last one.
    """

    first_row: int
    last_row: int
    first_entry: int
    last_entry: int


@dataclass(frozen=True, eq=False)
class Structure:
    """Index tensors of a selection, which every forward, backward and merge uses.

    `positions`, `rows`, `row_starts` and `union_positions` are int32 if the weight has less than 2³¹ elements, else
    int64.

    Attributes:
        neurons: rows of the weight seen as `(neurons, inputs)`.
        inputs: columns of the weight seen so.
        transposed: whether the weight is stored as `(inputs, neurons)`, as in transformers' `Conv1D`.
        positions: position of each entry in the flattened stored weight, `(nnz,)`.
        rows: neuron of each entry, `(nnz,)`.
        row_starts: first entry of each neuron, and then the number of all entries, `(neurons + 1,)`.
        union: needed columns, the inputs that at least one entry reads, sorted, `(used,)` int64.
        union_positions: position of each entry's input in `union`, `(nnz,)`.
        chunks: runs of neurons, each with a product of at most `PRODUCT_ELEMENTS` elements, or of a single neuron.
        matrices: number of matrices that the weight stacks; see `positions`.
        shared: cache of the index tensors for copies that several readers of an input share; see `keeping`.
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
    matrices: int = 1
    shared: dict[tuple[int, ...], tuple[list[Tensor], Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @cached_property
    def by_column(self) -> tuple[Tensor, Tensor, Tensor]:
        """The entries in the order of their inputs (CSC).

        Returns:
            Index of each entry in the order of the neurons, `(nnz,)`; neuron of each entry, `(nnz,)`; and first entry
            of each input, `(inputs,)`.
        """
        with torch.inference_mode(False):  # training later uses the tensors that inference derives
            order = torch.argsort(self.union_positions, stable=True)
            columns = self.union.index_select(0, self.union_positions.index_select(0, order))
            starts = torch.searchsorted(columns, torch.arange(self.inputs, device=columns.device))
            small = self.rows.dtype
            return order.to(small), self.rows.index_select(0, order), starts.to(small)


def even_row_counts(entries: int, neurons: int) -> Tensor:
    """Return row counts that spread entries evenly over neurons, `(neurons,)` int32.

    The first neurons get one more entry where the division leaves a remainder.
    """
    counts = torch.full((neurons,), entries // neurons, dtype=torch.int32, device="cpu")
    counts[: entries % neurons] += 1
    return counts


def check_floating(name: str, tensor: Tensor, shape: torch.Size) -> None:
    """Check dtype and shape of a trained tensor.

    Args:
        name: what the error calls the tensor.
        tensor: what is checked.
        shape: expected shape.

    Raises:
        StructureError: the dtype is none of `VALUE_DTYPES`, or the shape differs.
    """
    if tensor.dtype not in VALUE_DTYPES:
        raise StructureError(f"{name} has dtype {tensor.dtype}, expected a floating dtype of 16 to 64 bits")
    if tensor.shape != shape:
        raise StructureError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise StructureError if a trained tensor holds NaN or infinity; the error calls it `name`."""
    # detached, because a check that adds to the graph makes recomputation under checkpointing differ
    if not bool(torch.isfinite(tensor.detach()).all()):
        raise StructureError(f"{name} contains NaN or infinity, expected finite values")


def check_entries(
    columns: Tensor, row_counts: Tensor, neurons: int, inputs: int, values: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Check that untrusted tensors form a valid selection, before any code indexes with them.

    Args:
        columns: input of each entry, `(nnz,)` integers, strictly increasing within a neuron.
        row_counts: entries of each neuron, `(neurons,)` integers.
        neurons: number of neurons of the layer. It comes from the model, never from a file.
        inputs: fan-in of the layer. It comes from the model too.
        values: ΔW at the selected entries, `(nnz,)` floating. Default: not checked.

    Returns:
        `columns` and `row_counts` as int64.

    Raises:
        StructureError: a dtype, shape, range or order is wrong, or values are not finite.
    """
    for name, tensor in (("fps_columns", columns), ("fps_row_counts", row_counts)):
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            raise StructureError(f"{name} has dtype {tensor.dtype}, expected an integer dtype")
        if tensor.dim() != 1:
            raise StructureError(f"{name} has shape {tuple(tensor.shape)}, expected one dimension")
    if row_counts.numel() != neurons:
        raise StructureError(f"fps_row_counts has {row_counts.numel()} elements, expected one per neuron, {neurons}")
    # int64 before any comparison, because small unsigned dtypes lack most operators and narrowing casts wrap silently
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
    columns: Tensor, row_counts: Tensor, neurons: int, inputs: int, transposed: bool = False, matrices: int = 1
) -> Structure:
    """Derive the index tensors of a selection.

    Args:
        columns: input of each entry, `(nnz,)` integers, strictly increasing within a neuron.
        row_counts: entries of each neuron, `(neurons,)` integers.
        neurons: number of neurons of the layer.
        inputs: fan-in of the layer.
        transposed: whether the weight is stored as `(inputs, neurons)`.
        matrices: number of matrices that the weight stacks; see `positions`.

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
    positions = stored_positions(rows, columns, neurons, inputs, transposed, matrices)
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
        matrices=matrices,
    )


def unite_structures(structures: list[Structure]) -> tuple[Structure, Tensor]:
    """Return the union of several selections of one layer.

    Args:
        structures: of one weight; one or more.

    Returns:
        The structure of the union. And for every entry of the given structures, in order, its index among the entries
        of the union, `(sum of all nnz,)` int64.
    """
    first = structures[0]
    stored = torch.cat([structure.positions for structure in structures]).to(torch.int64)
    how = first.neurons, first.inputs, first.transposed, first.matrices
    entries, places = torch.unique(row_major(stored, *how), return_inverse=True)
    row_counts = torch.bincount(entries // first.inputs, minlength=first.neurons)
    columns = entries % first.inputs
    return build_structure(columns, row_counts, *how), places
