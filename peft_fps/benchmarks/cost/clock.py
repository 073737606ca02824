"""Timing of tasks that take turns, so that a machine that slows down slows all of them."""

import gc
import logging
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Times:
    """Seconds of one task, in the order of the rounds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.seconds)

    def to_dict(self) -> dict[str, float | list[float]]:
        """Return the times and what sums them up, in seconds."""
        spread = {"median": self.median, "min": min(self.seconds), "max": max(self.seconds)}
        return {**spread, "all": list(self.seconds)}


def interleave(
    tasks: Mapping[str, Callable[[], object]],
    rounds: int,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
    warm_up: bool = True,
) -> dict[str, Times]:
    """Time tasks in turn, A B C A B C ...

    Args:
        tasks: functions without arguments, by name.
        rounds: number of rounds that count, at least 1.
        device: `"cuda"` waits for the device before every reading of the clock.
        clock: returns seconds.
        warm_up: begin with a round that does not count.

    Returns:
        The times of each task, by name.
    """
    found: dict[str, list[float]] = {name: [] for name in tasks}
    gc.collect()
    for turn in range(0 if warm_up else 1, rounds + 1):
        for name, task in tasks.items():
            _wait(device)
            start = clock()
            task()
            _wait(device)
            if turn:
                found[name].append(clock() - start)
        logger.debug("round %d of %d: %s", turn, rounds, ", ".join(tasks))
    return {name: Times(tuple(seconds)) for name, seconds in found.items()}


def _wait(device: str) -> None:
    """Wait until a CUDA device has finished; nothing on the CPU."""
    if device == "cuda":
        torch.cuda.synchronize()
