"""The best scores of all layers together, exact to the entry, with one layer's scores in memory at a time."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from peft_fps.selection.candidate import Candidate


def best_of_all(candidates: Mapping[str, Candidate], total: int) -> Iterator[tuple[str, Tensor]]:
    """Find the `total` best weights of all layers. Ties go to the earlier layer, then to the lowest position.

    Args:
        candidates: layers by name. Their numbers of entries do not count.
        total: number of weights to find.

    Yields:
        Name of each layer in the given order, and the positions of those best weights that lie in it, in the flattened
        `(neurons, inputs)`, `(count,)` int64, increasing.
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
    """Return the bit pattern of the lowest selected score, and how many scores equal to it are selected.

    One pass counts scores by their leading 16 bits. Another pass counts the scores of the bin with the lowest selected
    score by the remaining 15 bits. So memory holds only a histogram, however many scores are tied.

    Args:
        candidates: layers to score. The function iterates over them twice.
        total: number of scores to select.
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
    """Return the bin with the lowest of the `count` largest scores, and how many of these scores are in it.

    Args:
        histograms: number of scores per bin, `(bins,)`, of each layer.
        count: number of scores, at least 1.
    """
    histogram = sum(counts.cpu() for counts in histograms)
    assert isinstance(histogram, Tensor)
    at_least = histogram.flip(0).cumsum(0).flip(0)
    last = int((at_least >= count).nonzero()[-1])
    return last, count - int(at_least[last] - histogram[last])


def _bits(candidate: Candidate) -> Tensor:
    """Return the bit patterns of a layer's scores, `(neurons * inputs,)` int32.

    Bit patterns of floats that are not negative have the order of the floats.
    """
    return candidate.score(0, candidate.shape.neurons).reshape(-1).view(torch.int32)
