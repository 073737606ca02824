"""The forward pass over data that gathers input statistics, batch by batch."""

from collections.abc import Generator, Mapping
from contextlib import closing
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from peft_fps.base.packed_weight import PackedWeight
from peft_fps.base.sharded import has_shards
from peft_fps.calibration.calls import Run, feed
from peft_fps.calibration.collect import Collector, Observed
from peft_fps.calibration.gathered_calls import gathered_in_calls
from peft_fps.calibration.passes import Pass, device_of
from peft_fps.calibration.preserve import undisturbed
from peft_fps.calibration.statistics import InputStatistics, wide_dtype
from peft_fps.calibration.together import is_distributed


def observe(
    model: nn.Module, layers: Mapping[str, Observed], norm: str, data: Pass, run: Run | None = None
) -> tuple[dict[str, InputStatistics], dict[str, int]]:
    """Run the model on data and return the input statistics of the layers that the data reaches.

    Under torch.distributed each process has its own data, which may be empty. All processes return the sums over all.
    A sharded model runs in step, with one module's parameters gathered at a time.

    Args:
        model: model that runs on every batch. It is unchanged afterwards, after an error too.
        layers: layers to observe, by module path.
        norm: `"l1"` for sums of |a|, `"l2"` for sums of a², `"signed"` for sums of a.
        data: the batches.
        run: runs the model on a batch. Default: `run_model`.

    Returns:
        Statistics by module path, and the numbers of `batches` and `examples`.

    Raises:
        ValueError: there is no data, or an input is not finite.
        TypeError: the data is of an unknown kind.
    """
    device = device_of(model)
    with undisturbed(model), gathered_in_calls(model, device), Collector(layers, norm, model) as collector:
        data.start(device)
        with closing(data.in_step(device) if has_shards(model) else _own(data)) as passing:
            for index, batch, counts_here in passing:
                if not counts_here:
                    feed(model, batch, device, run)
                    continue
                collector.start_batch(batch, model)
                data.counts["examples"] += feed(model, batch, device, run)
                collector.check_batch(index)
        counts = data.finish(device)
        if is_distributed():
            return _sum_over_processes(collector.statistics, layers, device), counts
    return collector.statistics, counts


def _own(data: Pass) -> Generator[tuple[int, Any, bool], None, None]:
    """Yield what `Pass.in_step` yields, of this process alone."""
    with closing(iter(data)) as passing:
        for index, batch in passing:
            yield index, batch, True


def _sum_over_processes(
    statistics: Mapping[str, InputStatistics],
    layers: Mapping[str, Observed],
    device: torch.device,
) -> dict[str, InputStatistics]:
    """Add up the statistics of all processes.

    All layers take part, because each process may have reached other ones.

    Args:
        statistics: statistics of this process by module path.
        layers: all observed layers, the same in every process.
        device: device of collective operations.
    """
    total = {}
    for path, layer in layers.items():
        local = statistics.get(path)
        apart = isinstance(layer.base, PackedWeight)
        counts = layer.groups if apart else 1
        packed = torch.zeros(layer.groups * layer.inputs + counts, dtype=wide_dtype(device), device=device)
        if local is not None:
            packed[:-counts], packed[-counts:] = local.sums.reshape(-1), local.positions
        dist.all_reduce(packed)
        if packed[-counts:].sum() > 0:
            positions = packed[-counts:].cpu().long() if apart else int(packed[-1])
            sums = packed[:-counts].view(layer.groups, layer.inputs)
            total[path] = InputStatistics(sums, positions, None if local is None else local.unmasked)
    return total
