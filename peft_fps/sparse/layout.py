"""How a weight that reads as a matrix `(neurons, inputs)` is stored."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Where the entries of a matrix `(neurons, inputs)` lie in the stored weight.

    Most weights are stored by rows, as `(neurons, ...)` with the inputs flattened. A transposed convolution stores
    `(input channels, neurons / groups, *kernel)`. An input of its neurons is an input channel of their group together
    with a position in the kernel (a tap), and the taps of one channel are neighbouring columns:
    `column = channel · taps + tap`. transformers' `Conv1D` stores `(inputs, neurons)`, which is the same with one
    group and one tap.

    A stacked weight holds several matrices, `(matrices, neurons / matrices, inputs)`, or with its inputs first
    `(matrices, inputs, neurons / matrices)`. Their neurons count on, and `groups` is the number of matrices.

    Attributes:
        transposed: whether the weight is stored with its inputs first. Default: by rows.
        groups: number of groups of channels, or of matrices. It counts only if `transposed`.
        taps: number of positions in the kernel. It counts only if `transposed`.
        stacked: whether the first dimension of the stored weight counts matrices.
    """

    transposed: bool = False
    groups: int = 1
    taps: int = 1
    stacked: bool = False

    def positions(self, rows: Tensor, columns: Tensor, neurons: int, inputs: int) -> Tensor:
        """Return the positions of entries in the flattened stored weight, `(nnz,)` int64.

        Args:
            rows: neuron of each entry, `(nnz,)` int64.
            columns: input of each entry, `(nnz,)` int64.
            neurons: number of rows of the matrix.
            inputs: number of its columns.
        """
        if not self.transposed:
            return rows * inputs + columns
        width, channels = neurons // self.groups, inputs // self.taps
        channel = rows // width * channels + columns // self.taps
        return (channel * width + rows % width) * self.taps + columns % self.taps

    def entries(self, positions: Tensor, neurons: int, inputs: int) -> Tensor:
        """Return what `positions` was made of, as `row · inputs + column` of each entry, `(nnz,)` int64."""
        if not self.transposed:
            return positions
        width, channels = neurons // self.groups, inputs // self.taps
        channel, place = positions // (width * self.taps), positions // self.taps % width
        row = channel // channels * width + place
        return row * inputs + channel % channels * self.taps + positions % self.taps

    def matrix(self, stored: Tensor) -> Tensor:
        """Return a tensor of the weight's stored shape as a matrix, `(neurons, inputs)`; a view where that can be."""
        if self.stacked:
            return (stored.transpose(1, 2) if self.transposed else stored).flatten(0, 1)
        if not self.transposed:
            return stored.flatten(1)
        blocks = stored.reshape(self.groups, -1, stored.shape[1], self.taps)
        return blocks.transpose(1, 2).reshape(self.groups * stored.shape[1], -1)
