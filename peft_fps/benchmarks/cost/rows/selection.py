"""Time and memory of choosing the weights to train."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from peft_fps.benchmarks.cost.clock import Times, interleave
from peft_fps.benchmarks.cost.figures import Figure, Row, plain
from peft_fps.benchmarks.cost.gradient_selection import VARIANTS, GradientSelection
from peft_fps.benchmarks.cost.methods import PER_NEURON, adapt
from peft_fps.benchmarks.cost.random_models import batches, build_model, largest_weight, reads_images
from peft_fps.benchmarks.cost.workload import Workload
from peft_fps.benchmarks.tensor_memory import in_own_processes, peak_bytes, tensor_bytes
from peft_fps.config import FPSConfig


logger = logging.getLogger(__name__)

PASSES = {"forward": "bare forward passes", "fps": "FPS"}
NO_IMAGES = "the contrastive loss needs two views of images and their classes"


def measure(workload: Workload) -> Row:
    """Time calibration beside bare forward passes and beside selection by gradients, and count their peaks."""
    base = build_model(workload)
    names = [name for name, variant in VARIANTS.items() if reads_images(base) or not variant.contrastive]
    skipped = {name: NO_IMAGES for name in VARIANTS if name not in names}
    count = workload.selection_batches

    logger.info("selection: time over %d batches", count)
    device = workload.device
    times = interleave({name: selecting(name, workload, count) for name in PASSES}, workload.timed_rounds, device)
    slow = {name: selecting(name, workload, count) for name in ("fps", *names)}
    against = interleave(slow, 1, device, warm_up=False)  # minutes each
    del slow

    logger.info("selection: memory, a process each")
    kinds = [*PASSES, *names]
    found = in_own_processes([partial(peak_of, name, workload.in_process()) for name in kinds], workload.processes)
    peaks = dict(zip(kinds, found, strict=True))
    weights, largest = tensor_bytes(base.parameters()), largest_weight(base)
    raw = {
        "seconds": plain(times),
        "seconds_against_gradients": plain(against),
        "peak_bytes": peaks,
        "parameter_bytes": weights,
        "largest_weight_bytes": largest,
        "batches": count,
    }
    figures = _figures(times, against, peaks, weights, largest)
    title = f"choosing the weights, {count} batches of {workload.selection_size}"
    return Row("selection", title, figures, raw, skipped)


def _figures(
    times: dict[str, Times], against: dict[str, Times], peaks: dict[str, int], weights: int, largest: int
) -> tuple[Figure, ...]:
    extra = (peaks["fps"] - peaks["forward"]) / largest
    figures = [
        Figure("FPS ÷ bare forward passes, time", times["fps"].median / times["forward"].median, at_most=1.10),
        Figure("FPS beyond bare forward passes, peak", extra, "weights", at_most=2),
    ]
    for name, variant in VARIANTS.items():
        if name in against:
            # the targets are about GPS as it is; the other variants show what of it is the gradients' own cost
            time, memory = (2.5, 9.0) if name == "gps" else (None, None)
            ratio = against[name].median / against["fps"].median
            with_weights = (weights + peaks[name]) / (weights + peaks["fps"])
            figures += [
                Figure(f"{variant.label} ÷ FPS, time", ratio, at_least=time),
                Figure(f"{variant.label} ÷ FPS, peak", peaks[name] / peaks["fps"], at_least=memory),
                Figure(f"{variant.label} ÷ FPS, peak with the weights", with_weights, at_least=memory),
            ]
    return tuple(figures)


def peak_of(name: str, workload: Workload) -> int:
    """Return the peak bytes of one way to select, to be called in a process that has done nothing else."""
    workload.prepare()
    # gradients have been allocated when the second batch comes
    return peak_bytes(selecting(name, workload, 2), workload.device)


def selecting(name: str, workload: Workload, count: int) -> Callable[[], object]:
    """Return a function that selects once.

    Args:
        name: `"forward"` for forward passes alone, `"fps"`, or a key of `VARIANTS`.
        workload: the model and the batch size.
        count: number of batches.
    """
    base = build_model(workload)
    data = batches(base, workload.selection_size, count)
    if name in VARIANTS:
        return _within(workload, partial(GradientSelection(base, VARIANTS[name]).select, data))
    if name == "fps":
        model: Any = adapt(base, FPSConfig(per_neuron=PER_NEURON))
        return _within(workload, partial(model.calibrate, data, progress=False))
    return _within(workload, partial(forward_passes, base.eval(), data))


def _within(workload: Workload, task: Callable[[], object]) -> Callable[[], object]:
    def run() -> None:
        with workload.autocast():
            task()

    return run


@torch.no_grad()
def forward_passes(model: Any, data: list[dict[str, torch.Tensor]]) -> None:
    """Run the model over batches, labels left out."""
    for batch in data:
        model(**{name: value for name, value in batch.items() if name != "labels"})
