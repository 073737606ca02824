"""Time and memory of choosing the weights to train, beside bare forward passes and other ways to choose."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from peft_fps.benchmarks.cost.clock import Times, interleave
from peft_fps.benchmarks.cost.figures import Figure, Row, plain
from peft_fps.benchmarks.cost.gradient_selection import VARIANTS, GradientSelection, mirrored
from peft_fps.benchmarks.cost.methods import PER_NEURON, adapt
from peft_fps.benchmarks.cost.random_models import batches, build_model, largest_weight, reads_images
from peft_fps.benchmarks.cost.workload import Workload
from peft_fps.benchmarks.tensor_memory import in_own_processes, peak_bytes, tensor_bytes
from peft_fps.config import FPSConfig


logger = logging.getLogger(__name__)

FORWARD, FPS = "forward", "fps"
NO_IMAGES = "the contrastive loss needs two views of images and their classes"


@dataclass(frozen=True)
class Kind:
    """A way to score the weights.

    Attributes:
        config: fields of the config.
        calibrate: arguments of `calibrate`.
    """

    config: dict[str, Any]
    calibrate: dict[str, Any] = field(default_factory=dict)

    @property
    def contrastive(self) -> bool:
        """Whether it needs images."""
        return self.config.get("loss") == "contrastive"


KINDS = {
    "magnitude": Kind({"importance": "magnitude"}),
    "activation": Kind({"importance": "activation"}),
    "gradient": Kind({"importance": "gradient"}),
    "gradient, contrastive": Kind({"importance": "gradient", "loss": "contrastive"}, {"views": mirrored}),
    "gradient, streaming": Kind({"importance": "gradient"}, {"accumulators": "streaming"}),
    "sensitivity": Kind({"importance": "sensitivity"}),
    "fisher, each batch": Kind({"importance": "fisher", "fisher": "batch"}),
    "fisher, each example": Kind({"importance": "fisher", "fisher": "example"}),
    "movement": Kind({"importance": "movement"}),
    "l0": Kind({"importance": "l0"}),
}
"""Every importance, by the name in the tables."""


def measure_selection(workload: Workload) -> Row:
    """Time calibration beside bare forward passes and beside selection by gradients, and count their peaks."""
    base = build_model(workload)
    names = [name for name, variant in VARIANTS.items() if reads_images(base) or not variant.contrastive]
    skipped = {name: NO_IMAGES for name in VARIANTS if name not in names}
    count, size = workload.selection_batches, workload.selection_size

    logger.info("selection: time over %d batches", count)
    times = _times((FORWARD, FPS), workload, size, workload.timed_rounds)
    against = _times((FPS, *names), workload, size, 1, warm_up=False)  # minutes each
    peaks = _peaks((FORWARD, FPS, *names), workload, size)
    weights, largest = tensor_bytes(base.parameters()), largest_weight(base)
    raw = {
        "seconds": plain(times),
        "seconds_against_gradients": plain(against),
        "peak_bytes": peaks,
        "parameter_bytes": weights,
        "largest_weight_bytes": largest,
        "batches": count,
    }
    figures = _selection_figures(times, against, peaks, weights, largest)
    return Row("selection", f"choosing the weights, {count} batches of {size}", figures, raw, skipped)


def _selection_figures(
    times: dict[str, Times], against: dict[str, Times], peaks: dict[str, int], weights: int, largest: int
) -> tuple[Figure, ...]:
    """Return the ratios of FPS to bare forward passes, and of gradients to FPS."""
    extra = (peaks[FPS] - peaks[FORWARD]) / largest
    figures = [
        Figure("FPS ÷ bare forward passes, time", times[FPS].median / times[FORWARD].median, at_most=1.10),
        Figure("FPS beyond bare forward passes, peak", extra, "weights", at_most=2),
    ]
    for name, variant in VARIANTS.items():
        if name in against:
            # the targets are about GPS as it is; the other variants show what of it is the gradients' own cost
            time, memory = (2.5, 9.0) if name == "gps" else (None, None)
            ratio = against[name].median / against[FPS].median
            with_weights = (weights + peaks[name]) / (weights + peaks[FPS])
            figures += [
                Figure(f"{variant.label} ÷ FPS, time", ratio, at_least=time),
                Figure(f"{variant.label} ÷ FPS, peak", peaks[name] / peaks[FPS], at_least=memory),
                Figure(f"{variant.label} ÷ FPS, peak with the weights", with_weights, at_least=memory),
            ]
    return tuple(figures)


def measure_importances(workload: Workload) -> Row:
    """Time every importance's selection beside bare forward passes over the same batches, and count its peak."""
    base = build_model(workload)
    names = [name for name, kind in KINDS.items() if reads_images(base) or not kind.contrastive]
    skipped = {name: NO_IMAGES for name in KINDS if name not in names}
    count, size = workload.selection_batches, workload.batch_size

    logger.info("importance: time over %d batches", count)
    times = _times((FORWARD, *names), workload, size, workload.timed_rounds)
    peaks, weights = _peaks((FORWARD, *names), workload, size), tensor_bytes(base.parameters())
    figures = []
    for name in names:
        figures += [
            Figure(f"{name} ÷ bare forward passes, time", times[name].median / times[FORWARD].median),
            Figure(f"{name}, peak beyond the model", peaks[name] / weights, "models"),
        ]
    raw = {"seconds": plain(times), "peak_bytes": peaks, "parameter_bytes": weights, "batches": count}
    title = f"choosing the weights by every importance, {count} batches of {size}"
    return Row("importance", title, tuple(figures), raw, skipped)


def _times(
    names: tuple[str, ...], workload: Workload, size: int, rounds: int, warm_up: bool = True
) -> dict[str, Times]:
    """Time ways to select in turn, on batches of `size` examples."""
    tasks = {name: selecting(name, workload, size, workload.selection_batches) for name in names}
    return interleave(tasks, rounds, workload.device, warm_up=warm_up)


def _peaks(names: tuple[str, ...], workload: Workload, size: int) -> dict[str, int]:
    """Return the peak bytes of ways to select, each measured in a process of its own."""
    logger.info("peaks of memory, a process for each of %s", ", ".join(names))
    jobs = [partial(peak_of, name, workload.in_process(), size) for name in names]
    return dict(zip(names, in_own_processes(jobs, workload.processes), strict=True))


def peak_of(name: str, workload: Workload, size: int) -> int:
    """Return the peak bytes of one way to select, to be called in a process that has done nothing else.

    Args:
        name: as in `selecting`.
        workload: the model, and how to measure.
        size: examples per batch.
    """
    workload.prepare()
    # gradients have been allocated when the second batch comes
    return peak_bytes(selecting(name, workload, size, 2), workload.device)


def selecting(name: str, workload: Workload, size: int, count: int) -> Callable[[], object]:
    """Return a function that selects once.

    Args:
        name: `"forward"` for forward passes alone, `"fps"`, or a key of `KINDS` or `VARIANTS`.
        workload: the model, and the precision.
        size: examples per batch.
        count: number of batches.
    """
    base = build_model(workload)
    data = batches(base, size, count)
    if name == FORWARD:
        task: Callable[[], object] = partial(forward_passes, base.eval(), data)
    elif name in VARIANTS:
        task = partial(GradientSelection(base, VARIANTS[name]).select, data)
    else:
        kind = KINDS["activation" if name == FPS else name]
        model: Any = adapt(base, FPSConfig(per_neuron=PER_NEURON, **kind.config))
        task = partial(model.calibrate, data, progress=False, **kind.calibrate)

    def run() -> None:
        with workload.autocast():
            task()

    return run


@torch.no_grad()
def forward_passes(model: Any, data: list[dict[str, Tensor]]) -> None:
    """Run the model over batches without gradients, labels left out."""
    for batch in data:
        model(**{name: value for name, value in batch.items() if name != "labels"})
