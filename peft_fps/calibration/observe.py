"""The forward pass over data: gather input statistics batch by batch."""

from collections.abc import Mapping
from contextlib import closing

import torch
import torch.distributed as dist
from torch import nn

from peft_fps.calibration.calls import Run, feed
from peft_fps.calibration.collect import Collector, Observed
from peft_fps.calibration.passes import Pass, device_of
from peft_fps.calibration.preserve import undisturbed
from peft_fps.calibration.statistics import InputStatistics, wide_dtype
from peft_fps.calibration.together import is_distributed


def observe(
    model: nn.Module, layers: Mapping[str, Observed], norm: str, data: Pass, run: Run | None = None
) -> tuple[dict[str, InputStatistics], dict[str, int]]:
    """Run the model on data and return the input statistics of the layers that were reached.

    Under torch.distributed each process brings its own data, some or none, and all return the sums over all processes.

    Args:
        model: called with every batch; left as it was, whatever happens.
        layers: what to observe, by module path.
        norm: `"l1"` or `"l2"`.
        data: the batches.
        run: how the model is run on a batch; see `feed`.

    Returns:
        Statistics by module path, and the numbers of `batches` and `examples`.

    Raises:
        ValueError: no data, or an input that is not finite.
        TypeError: data of an unknown kind.
    """
    device = device_of(model)
    with undisturbed(model), Collector(layers, norm, model) as collector:
        data.start(device)
        with closing(iter(data)) as passing:
            for index, batch in passing:
                collector.start_batch(batch, model)
                data.counts["examples"] += feed(model, batch, device, run)
                collector.check_batch(index)
        counts = data.finish(device)
        if is_distributed():
            return _sum_over_processes(collector.statistics, layers, device), counts
    return collector.statistics, counts


def _sum_over_processes(
    statistics: Mapping[str, InputStatistics],
    layers: Mapping[str, Observed],
    device: torch.device,
) -> dict[str, InputStatistics]:
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
    return total
