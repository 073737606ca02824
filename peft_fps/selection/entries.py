"""The selected entries of one module, checked when they are made."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_fps.selection.budget_allocation import LayerShape
from peft_fps.sparse import StructureError, check_entries


@dataclass(frozen=True, eq=False)
class ModuleEntries:
    """The selected entries of one module, whose weight is seen as `(neurons, inputs)`.

    The tensors may be given in any integer dtype and on any device. They are stored as int32 on the CPU.

    Attributes:
        columns: input of each entry, strictly increasing within a neuron, `(nnz,)` int32.
        row_counts: entries of each neuron, `(neurons,)` int32.
        inputs: fan-in of a neuron, from 1 to 2³¹.

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
        """Make entries of untrusted tensors for a module of known size.

        Args:
            columns: input of each entry, `(nnz,)` integers.
            row_counts: entries of each neuron, `(neurons,)` integers.
            neurons: number of neurons of the module.
            inputs: fan-in of the module.

        Raises:
            StructureError: the tensors do not form a selection of a module of this size.
        """
        check_entries(columns, row_counts, neurons, inputs)
        return cls(columns, row_counts, inputs)

    @property
    def neurons(self) -> int:
        """Number of neurons, the rows of the weight."""
        return self.row_counts.numel()

    @property
    def shape(self) -> LayerShape:
        """Shape of the weight, `(neurons, inputs)`."""
        return LayerShape(self.neurons, self.inputs)

    @property
    def entries(self) -> int:
        """Number of selected entries."""
        return self.columns.numel()

    def positions(self) -> Tensor:
        """Return the positions of the entries in the flattened `(neurons, inputs)`, `(nnz,)` int64, increasing."""
        return torch.repeat_interleave(self.row_counts.long()) * self.inputs + self.columns

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ModuleEntries):
            return NotImplemented
        same = self.inputs == other.inputs and torch.equal(self.row_counts, other.row_counts)
        return same and torch.equal(self.columns, other.columns)


def check_same_modules(
    found: Mapping[str, LayerShape], expected: Mapping[str, LayerShape], given: str, whose: str, remedy: str
) -> None:
    """Check that two selections have the same modules with the same shapes.

    Args:
        found: shapes of the one, by module path.
        expected: shapes of the other, by module path.
        given: what messages call the one.
        whose: what messages call the other.
        remedy: last sentence of messages.

    Raises:
        ValueError: a module is missing on one side, or has another number of neurons or another fan-in.
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
