"""The selected entries of one module, checked once and for all."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_fps.selection.budget_allocation import LayerShape
from peft_fps.sparse import StructureError, check_entries


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
        checked = check_entries(self.columns, self.row_counts, self.row_counts.numel(), self.inputs)
        for name, tensor in zip(("columns", "row_counts"), checked, strict=True):
            object.__setattr__(self, name, tensor.to("cpu", torch.int32))

    @classmethod
    def of_size(cls, columns: Tensor, row_counts: Tensor, neurons: int, inputs: int) -> "ModuleEntries":
        """Build entries from tensors of whatever origin, which must be of so many neurons.

        Raises:
            StructureError: they are not, or do not form a selection.
        """
        check_entries(columns, row_counts, neurons, inputs)
        return cls(columns, row_counts, inputs)

    @property
    def neurons(self) -> int:
        """Rows of the weight."""
        return self.row_counts.numel()

    @property
    def shape(self) -> LayerShape:
        """Of the weight."""
        return LayerShape(self.neurons, self.inputs)

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


def check_same_modules(
    found: Mapping[str, LayerShape], expected: Mapping[str, LayerShape], given: str, whose: str, remedy: str
) -> None:
    """Raise ValueError unless both have the same modules, neurons and fan-ins.

    Args:
        found: shapes by module path.
        expected: likewise.
        given: what messages call the first.
        whose: what messages call the second.
        remedy: the end of messages.
    """
    for path in [*expected, *found]:
        if path not in found:
            raise ValueError(f"{path}: not in {given}, expected all {len(expected)} modules of {whose}. {remedy}")
        if path not in expected:
            raise ValueError(f"{path}: in {given}, expected the {len(expected)} modules of {whose} alone. {remedy}")
        one, other = found[path], expected[path]
        if one != other:
            raise ValueError(
                f"{path}: found {one.neurons} neurons with {one.inputs} inputs in {given}, expected {other.neurons} "
                f"with {other.inputs} as in {whose}. {remedy}"
            )
