"""Time and memory of every importance's selection."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from peft_fps.benchmarks.cost.clock import interleave
from peft_fps.benchmarks.cost.figures import Figure, Row, plain
from peft_fps.benchmarks.cost.methods import PER_NEURON, adapt
from peft_fps.benchmarks.cost.random_models import batches, build_model, reads_images
from peft_fps.benchmarks.cost.rows.selection import NO_IMAGES, forward_passes
from peft_fps.benchmarks.cost.workload import Workload
from peft_fps.benchmarks.tensor_memory import in_own_processes, peak_bytes, tensor_bytes
from peft_fps.config import FPSConfig


logger = logging.getLogger(__name__)

FORWARD = "forward"


@dataclass(frozen=True)
class Kind:
    """A way to score the weights: options of the config, and of `calibrate`."""

    config: dict[str, Any]
    calibrate: dict[str, Any] = field(default_factory=dict)

    @property
    def contrastive(self) -> bool:
        """Whether it needs images."""
        return self.config.get("loss") == "contrastive"


def _flipped(images: Tensor) -> Tensor:
    """Two views whose making costs next to nothing: augmentation is the data pipeline's cost."""
    return torch.cat([images, images.flip(-1)])


KINDS = {
    "magnitude": Kind({"importance": "magnitude"}),
    "activation": Kind({"importance": "activation"}),
    "gradient": Kind({"importance": "gradient"}),
    "gradient, contrastive": Kind({"importance": "gradient", "loss": "contrastive"}, {"views": _flipped}),
    "gradient, streaming": Kind({"importance": "gradient"}, {"accumulators": "streaming"}),
    "sensitivity": Kind({"importance": "sensitivity"}),
    "fisher, each batch": Kind({"importance": "fisher", "fisher": "batch"}),
    "fisher, each example": Kind({"importance": "fisher", "fisher": "example"}),
    "movement": Kind({"importance": "movement"}),
    "l0": Kind({"importance": "l0"}),
}


def measure(workload: Workload) -> Row:
    """Time every importance's selection beside bare forward passes over the same batches, and count its peak."""
    base = build_model(workload)
    images = reads_images(base)
    names = [name for name, kind in KINDS.items() if images or not kind.contrastive]
    skipped = {name: NO_IMAGES for name in KINDS if name not in names}
    count, kinds = workload.selection_batches, [FORWARD, *names]

    logger.info("importance: time over %d batches", count)
    tasks = {name: selecting(name, workload, count) for name in kinds}
    times = interleave(tasks, workload.timed_rounds, workload.device)
    del tasks

    logger.info("importance: memory, a process each")
    found = in_own_processes([partial(peak_of, name, workload.in_process()) for name in kinds], workload.processes)
    peaks, weights = dict(zip(kinds, found, strict=True)), tensor_bytes(base.parameters())
    figures = []
    for name in names:
        figures += [
            Figure(f"{name} ÷ bare forward passes, time", times[name].median / times[FORWARD].median),
            Figure(f"{name}, peak beyond the model", peaks[name] / weights, "models"),
        ]
    raw = {"seconds": plain(times), "peak_bytes": peaks, "parameter_bytes": weights, "batches": count}
    title = f"choosing the weights by every importance, {count} batches of {workload.batch_size}"
    return Row("importance", title, tuple(figures), raw, skipped)


def peak_of(name: str, workload: Workload) -> int:
    """Return the peak bytes of one selection, to be called in a process that has done nothing else."""
    workload.prepare()
    return peak_bytes(selecting(name, workload, 2), workload.device)


def selecting(name: str, workload: Workload, count: int) -> Callable[[], object]:
    """Return a function that selects once.

    Args:
        name: a key of `KINDS`, or `FORWARD` for forward passes alone.
        workload: the model and the batch size.
        count: number of batches.
    """
    base = build_model(workload)
    data = batches(base, workload.batch_size, count)
    if name == FORWARD:
        task: Callable[[], object] = partial(forward_passes, base.eval(), data)
    else:
        kind = KINDS[name]
        model: Any = adapt(base, FPSConfig(per_neuron=PER_NEURON, **kind.config))
        task = partial(model.calibrate, data, progress=False, **kind.calibrate)

    def run() -> None:
        with workload.autocast():
            task()

    return run
