"""Seconds and bytes of one run of a task, on the CPU and on a CUDA device."""

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from peft_fps.sparse.kernels.measured_choice import cuda_seconds


Task = Callable[[], object]
"""A function without arguments."""


class Reading(NamedTuple):
    """What one run took.

    Attributes:
        seconds: on a CUDA device those between two events on its stream.
        peak: the most bytes that PyTorch's allocator held beyond those before it; 0 on the CPU, which counts none.
    """

    seconds: float
    peak: int = 0


def read_cpu(task: Task, clock: Callable[[], float] = time.perf_counter) -> Reading:
    """Run a task on the CPU; `clock` returns seconds."""
    start = clock()
    task()
    return Reading(clock() - start)


def read_cuda(task: Task) -> Reading:
    """Run a task on the current CUDA device, which has finished everything before and after it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    seconds = cuda_seconds(task)
    return Reading(seconds, torch.cuda.max_memory_allocated() - before)


READERS: Mapping[str, Callable[[Task], Reading]] = {"cpu": read_cpu, "cuda": read_cuda}
"""How a run is read, by the kind of device."""
