"""Passes over data with a progress bar, batch by batch."""

from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from accelerate.data_loader import DataLoaderDispatcher
from torch import nn
from tqdm.auto import tqdm

from peft_fps.base.sharded import compute_device
from peft_fps.calibration.batches import batches
from peft_fps.calibration.shares import loader_of, reading_ends_together, without_repeats
from peft_fps.calibration.together import agree, is_distributed, shared_object


NO_BATCH = "The calibration data holds no batch, expected at least one. Nothing was changed."


@dataclass
class Pass:
    """One or several passes over data. Iterating yields the index of a batch and the batch.

    Attributes:
        data: batches or examples; see `peft_fps.calibration.batches.batches`.
        num_batches: largest number of batches in each pass. Default: all.
        batch_size: number of examples per batch, for data that consists of examples. Default: 32.
        collator: makes a batch of a list of examples.
        progress: show a progress bar.
        epochs: number of passes over the data. Default: 1.
        purpose: what the data is for, in errors.
        counts: numbers of `batches` and `examples` so far. The code that runs the model adds the examples.

    Raises:
        ValueError: `num_batches` is no positive integer, there is no data, or several passes need more than an
            iterator. While iterating: there is no batch.
        TypeError: the data is of an unknown kind.
    """

    data: Any
    num_batches: int | None = None
    batch_size: int = 32
    collator: Callable[..., Any] | None = None
    progress: bool = True
    epochs: int = 1
    purpose: str = "calibration"
    counts: dict[str, int] = field(default_factory=lambda: {"batches": 0, "examples": 0})

    def __post_init__(self) -> None:
        if self.num_batches is not None and (not isinstance(self.num_batches, int) or self.num_batches < 1):
            raise ValueError(
                f"num_batches is {self.num_batches!r}, expected an integer of at least 1, or None for all."
            )
        if self.data is None:
            raise ValueError(f"{self.purpose} needs data, found None. Pass the training DataLoader to calibrate.")
        self._source = batches(self.data, self.collator, self.batch_size)
        self._in_step = False
        if self.epochs > 1 and iter(self._source) is self._source:
            raise ValueError(
                f"{self.purpose} needs {self.epochs} passes over the data, found an iterator, which gives one. Pass a "
                "DataLoader, a dataset or a list."
            )

    def __iter__(self) -> Generator[tuple[int, Any], None, None]:
        length = _length(self._source, self.num_batches)
        total = None if length is None else length * self.epochs
        with tqdm(total=total, disable=not self.progress, desc="Calibrating", unit="batch") as bar:
            for _ in range(self.epochs):
                for batch in self._shares():
                    yield self.counts["batches"], batch
                    self.counts["batches"] += 1
                    bar.update()
        if not self.counts["batches"] and not is_distributed():
            raise ValueError(NO_BATCH)

    def _shares(self) -> Generator[Any, None, None]:
        """Yield the batches of one pass, without what was added to them so that all processes have as many."""
        loader, source = loader_of(self._source), islice(self._source, self.num_batches)
        with reading_ends_together(loader):
            for batch in source:
                own = without_repeats(loader, batch) if is_distributed() else batch
                if own is None:
                    continue
                try:
                    yield own
                except GeneratorExit:  # the code that runs the model has failed
                    self._keep_in_step(source)
                    raise

    def in_step(self, device: torch.device) -> Generator[tuple[int, Any, bool], None, None]:
        """Iterate over the batches of all processes side by side, since a sharded model runs in all of them or none.

        A process that has no batch left gets one of another process, so that it can take part.

        Args:
            device: device of collective operations.

        Yields:
            Index of the batch, the batch, and whether it is this process's own and counts here.
        """
        self._in_step = True
        with closing(iter(self)) as passing:
            while True:
                item = next(passing, None)
                batch, owner = shared_object(None if item is None else item[1], item is not None, device)
                if owner is None:
                    return
                yield (self.counts["batches"], batch, False) if item is None else (*item, True)

    def start(self, device: torch.device) -> None:
        """Wait until all processes of a distributed run are ready to read their data.

        Args:
            device: device of collective operations.

        Raises:
            FailedTogetherError: a process has failed.
        """
        agree(device)

    def finish(self, device: torch.device) -> dict[str, int]:
        """Wait until all processes of a distributed run have read their data, and return the sums of their counts.

        Args:
            device: device of collective operations.

        Raises:
            ValueError: no process has read a batch, or a process has failed.
        """
        if not is_distributed():
            return dict(self.counts)
        agree(device)
        summed = torch.tensor(list(self.counts.values()), device=device)
        dist.all_reduce(summed)
        counts = dict(zip(self.counts, summed.tolist(), strict=True))
        if not counts["batches"]:
            raise ValueError(NO_BATCH)
        return counts

    def _keep_in_step(self, source: Iterable[Any]) -> None:
        """Read the rest of the data if one process reads for all, so that the other processes get their batches."""
        # in step, the others have stopped reading too
        if is_distributed() and isinstance(loader_of(self._source), DataLoaderDispatcher) and not self._in_step:
            for _ in source:
                pass


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's inputs: that of its first parameter that is not on meta, else the CPU."""
    return next((compute_device(p) for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))


def _length(source: Iterable[Any], num_batches: int | None) -> int | None:
    """Return the number of batches in a pass, None if it is unknown.

    Args:
        source: the batches.
        num_batches: largest number of batches.
    """
    try:
        length = len(source)  # type: ignore[arg-type]
    except TypeError:  # a stream
        return num_batches
    return min(length, num_batches or length)
