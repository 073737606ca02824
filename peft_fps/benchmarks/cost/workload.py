"""What is measured, and how often."""

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from peft_fps.benchmarks.malloc import keep_freed


@dataclass(frozen=True)
class Workload:
    """The options of a benchmark, named as on the command line, where each is explained."""

    model: str = "vit-b16"
    batch_size: int = 8
    selection_batch_size: int = 32
    threads: int = 2
    device: str = "cpu"
    precision: str = "fp32"
    rounds: int = 7
    quick: bool = False
    system_malloc: bool = False

    def prepare(self) -> None:
        """Set the number of threads and the seed of the process, and let it keep the memory that it frees if wished.

        Raises:
            ValueError: the device is not there.
        """
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device is 'cuda', but PyTorch finds no CUDA device here.")
        torch.set_num_threads(self.threads)
        torch.manual_seed(0)
        if not self.system_malloc:
            keep_freed()

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context that a forward pass runs in."""
        return torch.autocast(self.device, torch.bfloat16) if self.precision == "bf16" else nullcontext()

    @property
    def timed_rounds(self) -> int:
        """Rounds of whatever takes seconds."""
        return min(self.rounds, 2) if self.quick else self.rounds

    @property
    def short_rounds(self) -> int:
        """Rounds of whatever takes milliseconds."""
        return 5 if self.quick else 6 * self.rounds

    @property
    def selection_batches(self) -> int:
        """Batches that a selection sees."""
        return 1 if self.quick else 2

    @property
    def selection_size(self) -> int:
        """Examples in each of them."""
        return min(self.selection_batch_size, 8) if self.quick else self.selection_batch_size

    @property
    def processes(self) -> int:
        """Processes that count bytes at the same time, which does not change the bytes."""
        return 2 if self.quick and self.device == "cpu" else 1

    def in_process(self) -> "Workload":
        """Return the workload of one of them, with its part of the threads."""
        return replace(self, threads=max(1, self.threads // self.processes))


@contextmanager
def switched(environment: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for the block."""
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
