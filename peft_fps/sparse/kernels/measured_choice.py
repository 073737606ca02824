"""Which of several algorithms is fastest on a CUDA device: measured on first use, once for each kind of operands."""

import logging
from collections.abc import Callable, Hashable, Mapping
from threading import Lock

import torch


logger = logging.getLogger(__name__)

RUNS = 3
"""Runs of each candidate that count, after one that does not. The shortest one decides."""

Candidate = Callable[[], object]

_chosen: dict[Hashable, str] = {}
_choosing = Lock()  # autograd has one thread per device


def size_class(*sizes: int) -> tuple[int, ...]:
    """Return the sizes rounded up to powers of two, as exponents."""
    return tuple((size - 1).bit_length() for size in sizes)


def cuda_seconds(candidate: Candidate) -> float:
    """Return the seconds of a run on the current CUDA device, between two events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    candidate()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def fastest(
    key: Hashable, candidates: Mapping[str, Candidate], seconds: Callable[[Candidate], float] = cuda_seconds
) -> str:
    """Return the name of the fastest candidate. The process measures once for each key.

    A candidate that fails is out of the question. The log says how long each one took, at level DEBUG.

    Args:
        key: device, dtype and class of sizes.
        candidates: by name. All compute the same.
        seconds: runs a candidate, and returns how long that took.

    Raises:
        Exception: of the last candidate, if all have failed.
    """
    with _choosing:
        if _chosen.get(key) not in candidates:
            _chosen[key] = _measure(candidates, seconds)
            logger.debug("%s: %s", key, _chosen[key])
        return _chosen[key]


def _measure(candidates: Mapping[str, Candidate], seconds: Callable[[Candidate], float]) -> str:
    taken: dict[str, float] = {}
    failure: Exception | None = None
    for name, candidate in candidates.items():
        try:
            taken[name] = min([seconds(candidate) for _ in range(1 + RUNS)][1:])
        except Exception as error:  # no memory, or no such operation in this dtype
            failure = error
            logger.debug("%s is not taken: %r", name, error)
    if not taken:
        assert failure is not None
        raise failure
    logger.debug("seconds: %s", taken)
    return min(taken, key=taken.__getitem__)
