"""Sums over batches that scores of weights need, one accumulator per module."""

import torch
from torch import Tensor

from peft_fps.selection import top_k, top_k_flat


SHORTLIST = 8
"""Length of a shortlist as a multiple of the number of entries to select."""


class Exact:
    """Sums of all elements of a weight.

    Attributes:
        total: the sums, `(neurons, inputs)` float32. None before the first term.

    Args:
        device: device of the sums. Default: that of the first term.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.total: Tensor | None = None
        self._device = device

    def add(self, term: Tensor) -> None:
        """Add a term, `(neurons, inputs)` float32."""
        term = term.to(self._device or term.device)
        # a copy, because the term may be a view of the gradient's memory
        self.total = term.clone(memory_format=torch.contiguous_format) if self.total is None else self.total.add_(term)

    def rows(self, first: int, last: int) -> Tensor:
        """Return the sums of the neurons `first:last`, `(last - first, inputs)` float32."""
        assert self.total is not None
        return self.total[first:last]

    @property
    def reached(self) -> bool:
        """Whether a term was added."""
        return self.total is not None

    def is_finite(self) -> bool:
        """Whether all sums are finite."""
        return self.total is None or bool(torch.isfinite(self.total).all())

    def is_zero(self) -> bool:
        """Whether all sums are zero."""
        return self.total is None or not bool(self.total.any())


class Streaming:
    """Exact sums of a shortlist: of the elements whose first term is largest.

    The shortlist misses an element that is small in the first batch and large afterwards. Elements off the shortlist
    have the sum 0.

    Attributes:
        sums: the sums of the shortlist, `(listed,)` float32. None before the first term.

    Args:
        entries: number of entries to select of the module. The shortlist is `SHORTLIST` times as long.
        by_neuron: whether each neuron has a shortlist. Otherwise the module has one.
        device: device of the sums. Default: that of the first term.
    """

    def __init__(self, entries: int, by_neuron: bool, device: torch.device | None = None) -> None:
        self.sums: Tensor | None = None
        self._entries = entries
        self._by_neuron = by_neuron
        self._device = device
        self._positions = torch.empty(0, dtype=torch.int64, device="cpu")
        self._shape = (0, 0)
        self._largest = torch.zeros((), dtype=torch.float32, device="cpu")

    def add(self, term: Tensor) -> None:
        """Add a term, `(neurons, inputs)` float32. The first term decides about the shortlist."""
        if self.sums is None:
            self._shape = (term.shape[0], term.shape[1])
            self._positions = self._shortlist(term.abs())
            device = self._device or term.device
            self.sums = torch.zeros(self._positions.numel(), dtype=torch.float32, device=device)
            self._largest = self._largest.to(term.device)
        # the largest magnitude too, because the sums do not show a NaN off the shortlist
        self._largest = torch.maximum(self._largest, torch.linalg.vector_norm(term, torch.inf))
        listed = term.reshape(-1).index_select(0, self._positions)
        self.sums += listed.to(self.sums.device)

    def rows(self, first: int, last: int) -> Tensor:
        """Return the sums of the neurons `first:last`, `(last - first, inputs)` float32, zero off the shortlist."""
        assert self.sums is not None
        inputs = self._shape[1]
        bounds = torch.tensor([first * inputs, last * inputs], device=self._positions.device)
        begin, end = torch.searchsorted(self._positions, bounds).tolist()
        dense = torch.zeros((last - first) * inputs, dtype=torch.float32, device=self.sums.device)
        positions = (self._positions[begin:end] - first * inputs).to(dense.device)
        return dense.index_copy_(0, positions, self.sums[begin:end]).view(last - first, inputs)

    @property
    def reached(self) -> bool:
        """Whether a term was added."""
        return self.sums is not None

    def is_finite(self) -> bool:
        """Whether all sums and all terms are finite."""
        return self.sums is None or bool(
            torch.isfinite(self.sums).all() & torch.isfinite(self._largest).to(self.sums.device)
        )

    def is_zero(self) -> bool:
        """Whether all sums are zero."""
        return self.sums is None or not bool(self.sums.any())

    def _shortlist(self, magnitudes: Tensor) -> Tensor:
        """Return the positions of the largest elements in the flattened weight, `(listed,)` int64, increasing.

        Args:
            magnitudes: absolute values of the first term, `(neurons, inputs)`.
        """
        neurons, inputs = magnitudes.shape
        magnitudes = magnitudes.nan_to_num()  # top_k needs finite numbers; `is_finite` reports NaN later
        if not self._by_neuron:
            return top_k_flat(magnitudes, min(SHORTLIST * self._entries, magnitudes.numel()))
        columns, _ = top_k(magnitudes, min(-(-SHORTLIST * self._entries // neurons), inputs))
        rows = torch.arange(neurons, device=columns.device)[:, None]
        return (rows * inputs + columns.sort(1).values).reshape(-1)


Accumulator = Exact | Streaming
