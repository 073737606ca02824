"""The forward pass over data: gather input statistics batch by batch."""

from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from tqdm.auto import tqdm

from peft_fps.calibration.batches import batches, feed
from peft_fps.calibration.collect import Collector, Observed
from peft_fps.calibration.preserve import undisturbed
from peft_fps.calibration.statistics import InputStatistics, wide_dtype


def observe(
    model: nn.Module,
    layers: Mapping[str, Observed],
    norm: str,
    data: Any,
    *,
    num_batches: int | None,
    batch_size: int,
    collator: Callable[..., Any] | None,
    progress: bool,
) -> tuple[dict[str, InputStatistics], dict[str, int]]:
    """Run the model on data and return the input statistics of the layers that were reached.

    Under torch.distributed each process brings its own data, and all return the sums over all processes.

    Args:
        model: called with every batch; left as it was, whatever happens.
        layers: what to observe, by module path.
        norm: `"l1"` or `"l2"`.
        data, num_batches, batch_size, collator, progress: see `peft_fps.calibrate`.

    Returns:
        Statistics by module path, and the numbers of `batches` and `examples`.

    Raises:
        ValueError: no data, or an input that is not finite.
        TypeError: data of an unknown kind.
    """
    if num_batches is not None and (not isinstance(num_batches, int) or num_batches < 1):
        raise ValueError(f"num_batches is {num_batches!r}, expected an integer of at least 1, or None for all.")
    if data is None:
        raise ValueError("importance='activation' needs data, found None. Pass the training DataLoader to calibrate.")
    source = batches(data, collator, batch_size)
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    examples = seen = 0
    with undisturbed(model), Collector(layers, norm) as collector:
        limited = islice(source, num_batches)
        shown: Iterable[Any] = tqdm(
            limited, total=_length(source, num_batches), disable=not progress, desc="Calibrating", unit="batch"
        )
        for batch in shown:
            collector.start_batch(batch)
            examples += feed(model, batch, device)
            collector.check_batch(seen)
            seen += 1
        if not seen:
            raise ValueError("The calibration data holds no batch, expected at least one. Nothing was changed.")
        counts = {"batches": seen, "examples": examples}
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            return _sum_over_processes(collector.statistics, layers, counts, device)
    return collector.statistics, counts


def _length(source: Iterable[Any], num_batches: int | None) -> int | None:
    try:
        length = len(source)  # type: ignore[arg-type]
    except TypeError:  # a stream
        return num_batches
    return min(length, num_batches or length)


def _sum_over_processes(
    statistics: Mapping[str, InputStatistics],
    layers: Mapping[str, Observed],
    counts: dict[str, int],
    device: torch.device,
) -> tuple[dict[str, InputStatistics], dict[str, int]]:
    """Add up what all processes saw; a module that one process did not reach may have been reached by another."""
    total = {}
    for path, layer in layers.items():
        own = statistics.get(path)
        packed = torch.zeros(layer.groups * layer.inputs + 1, dtype=wide_dtype(device), device=device)
        if own is not None:
            packed[:-1], packed[-1] = own.sums.reshape(-1), own.positions
        dist.all_reduce(packed)
        if packed[-1] > 0:
            total[path] = InputStatistics(packed[:-1].view(layer.groups, layer.inputs), int(packed[-1]))
    summed = torch.tensor(list(counts.values()), device=device)
    dist.all_reduce(summed)
    return total, dict(zip(counts, summed.tolist(), strict=True))
