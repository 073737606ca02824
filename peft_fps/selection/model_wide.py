"""The best scores of all layers together, exact to the entry, with one layer's scores in memory at a time."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from peft_fps.selection.candidate import Candidate


def best_of_all(candidates: Mapping[str, Candidate], total: int) -> Iterator[tuple[str, Tensor]]:
    """Find the `total` best weights of all layers; ties go to the earlier layer, then to the lowest index.

    Yields:
        In the given order each layer's name and the sorted flat positions of what it has among them, `(count,)` int64.
    """
    cut, ties = _cut(candidates.values(), total)
    for name, candidate in candidates.items():
        bits = _bits(candidate)
        best = bits > cut
        level = (bits == cut).nonzero()[:ties, 0]
        best[level] = True
        ties -= level.numel()
        yield name, best.nonzero()[:, 0]


def _cut(candidates: Iterable[Candidate], total: int) -> tuple[int, int]:
    """Bit pattern of the last score that is selected, and how many scores equal to it are.

    One pass counts scores by their leading 16 bits, and another those in the bin that holds the last score by the
    remaining 15, so that no more than a histogram is kept however many scores are tied.
    """
    if not total:
        return _ABOVE_ALL, 0
    leading = (torch.bincount(_bits(c) >> _LOW, minlength=1 << (31 - _LOW)) for c in candidates)
    high, left = _last_bin(leading, total)
    trailing = (
        torch.bincount(bits[bits >> _LOW == high] & ((1 << _LOW) - 1), minlength=1 << _LOW)
        for bits in map(_bits, candidates)
    )
    low, ties = _last_bin(trailing, left)
    return high << _LOW | low, ties


_LOW = 15
_ABOVE_ALL = (1 << 31) - 1


def _last_bin(histograms: Iterable[Tensor], count: int) -> tuple[int, int]:
    """Bin of the last of the `count` largest, and how many of them it holds."""
    histogram = sum(counts.cpu() for counts in histograms)
    assert isinstance(histogram, Tensor)
    at_least = histogram.flip(0).cumsum(0).flip(0)
    last = int((at_least >= count).nonzero()[-1])
    return last, count - int(at_least[last] - histogram[last])


def _bits(candidate: Candidate) -> Tensor:
    """Bit patterns of a layer's scores, flat int32: those of non-negative floats are ordered like the floats."""
    return candidate.score(0, candidate.shape.neurons).reshape(-1).view(torch.int32)
