"""Timing of tasks that take turns, so that a machine that slows down slows all of them."""

import gc
import logging
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from peft_fps.benchmarks.cost.device_timer import READERS, Reading, Task


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
    tasks: Mapping[str, Task],
    rounds: int,
    device: str = "cpu",
    read: Callable[[Task], Reading] | None = None,
    warm_up: bool = True,
) -> dict[str, Times]:
    """Time tasks in turn, A B C A B C ...

    Args:
        tasks: functions without arguments, by name.
        rounds: number of rounds that count, at least 1.
        device: kind of device, `"cpu"` or `"cuda"`.
        read: runs a task. Default: that of the device in `READERS`.
        warm_up: begin with a round that does not count.

    Returns:
        The times of each task, by name.
    """
    read = READERS[device] if read is None else read
    found: dict[str, list[float]] = {name: [] for name in tasks}
    gc.collect()
    for turn in range(0 if warm_up else 1, rounds + 1):
        for name, task in tasks.items():
            seconds = read(task).seconds
            if turn:
                found[name].append(seconds)
        logger.debug("round %d of %d: %s", turn, rounds, ", ".join(tasks))
    return {name: Times(tuple(seconds)) for name, seconds in found.items()}
