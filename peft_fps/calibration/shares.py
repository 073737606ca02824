"""What accelerate's loaders do to the share of data that a process reads.

They complete the last batches with examples from the beginning, so that all processes get batches of one size. And
with `dispatch_batches` the first process reads for all, so that the others wait for it when its reading fails.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from accelerate.data_loader import BatchSamplerShard, DataLoaderDispatcher, DataLoaderShard
from accelerate.utils import slice_tensors
from accelerate.utils.operations import ignorant_find_batch_size


def loader_of(source: Any) -> Any:
    """Return the loader inside a wrapper that names it as its `loader`, or the source itself."""
    return getattr(source, "loader", source)


def without_repeats(loader: Any, batch: Any) -> Any:
    """Return the part of a batch that accelerate has not added to complete it. None if it has added all of it.

    Args:
        loader: has just yielded the batch. Batches of loaders other than accelerate's are returned as they are.
        batch: of this process.
    """
    fresh = _fresh_in_last_round(loader)
    size = ignorant_find_batch_size(batch) if fresh else None
    if not fresh or size is None:
        return batch
    own = min(max(fresh - dist.get_rank() * size, 0), size)
    if own == size:
        return batch
    return slice_tensors(batch, slice(0, own)) if own else None


def _fresh_in_last_round(loader: Any) -> int:
    """Return how many examples of the last batches of all processes were not there before; 0 if that is unknown.

    It is 0 too before the last batches, and if none of them was completed.
    """
    if not getattr(loader, "end_of_dataloader", False):
        return 0
    if isinstance(loader, DataLoaderDispatcher):
        return max(int(loader.remainder), 0)
    sampler = getattr(loader, "batch_sampler", None)
    if not isinstance(loader, DataLoaderShard) or not isinstance(sampler, BatchSamplerShard):
        return 0
    inner: Any = sampler.batch_sampler
    examples, size = getattr(inner, "sampler", None), getattr(inner, "batch_size", None)
    if examples is None or size is None or not hasattr(examples, "__len__") or not sampler.even_batches:
        return 0
    together = size if sampler.split_batches else size * sampler.num_processes
    return len(examples) % together


@contextmanager
def reading_ends_together(loader: Any) -> Iterator[None]:
    """Let a failure to read end the data in all processes within the block, if one process reads for all.

    Args:
        loader: any loader or iterable.

    Raises:
        Exception: what has failed, in the process that reads. It is raised at the end of the block.
    """
    if not isinstance(loader, DataLoaderDispatcher):
        yield
        return
    fetch, failures = loader._fetch_batches, list[Exception]()

    def fetch_or_end(batches: Any) -> Any:
        try:
            return fetch(iter(()) if failures else batches)
        except Exception as error:
            if failures:
                raise
            failures.append(error)
            return fetch(iter(()))

    loader._fetch_batches = fetch_or_end
    try:
        yield
    except Exception:  # of accelerate, if not even the first batch came
        if not failures:
            raise
    finally:
        del loader._fetch_batches
    if failures:
        raise failures[0]
