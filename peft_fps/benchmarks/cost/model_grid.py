"""Steps of several models, batch sizes and precisions, with and without `torch.compile`, in a fixed time.

It is made for a GPU. Methods take turns within a case, in one process, where they share the weights.
"""

import gc
import logging
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from peft_fps.benchmarks.cost.device_timer import READERS, Reading, Task
from peft_fps.benchmarks.cost.figures import Figure, Row
from peft_fps.benchmarks.cost.methods import METHODS
from peft_fps.benchmarks.cost.random_models import build_model
from peft_fps.benchmarks.cost.training_step import Training
from peft_fps.benchmarks.cost.workload import Workload
from peft_fps.benchmarks.tensor_memory import tensor_bytes
from peft_fps.vision.option_types import Precision


logger = logging.getLogger(__name__)

COMPARED = ("full", "floor", "lora", "supertuning", "fps", "fps-pytorch")
"""Keys of the methods; each case compares all of them."""
COMPILED = ("full", "lora", "fps")
"""Keys of those that are compiled too, which takes most of the time."""
SECONDS = 480.0
"""Time for all cases. Those that do not begin within it are skipped, and named."""
FEWEST, MOST = 3, 15
"""Rounds of a case."""
WARM_UP = 2
"""Rounds before these: the first one compiles kernels and makes the optimizer's states."""


@dataclass(frozen=True)
class Case:
    """One model under one load.

    Attributes:
        model: as `Workload.model`.
        precision: as `Workload.precision`.
        batch_size: examples.
        compiled: with `torch.compile` beside without, in turn.
    """

    model: str
    precision: Precision
    batch_size: int
    compiled: bool = False

    @property
    def name(self) -> str:
        """The case in words."""
        return f"{self.model}, {self.precision}, batch {self.batch_size}{', compiled' if self.compiled else ''}"


VITS = ("vit-b16", "vit-l16")
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
CASES = (
    *(Case(model, precision, size) for model in VITS for precision in PRECISIONS for size in (32, 128)),
    *(Case("decoder-1b", precision, 8) for precision in PRECISIONS),
    *(Case(model, "bf16", size, compiled=True) for model, size in (("vit-b16", 128), ("decoder-1b", 8))),
    Case("vit-l16", "bf16", 128, compiled=True),
)
"""All cases, the most important ones first."""


def measure_grid(
    workload: Workload,
    cases: Sequence[Case] = CASES,
    read: Callable[[Task], Reading] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Row:
    """Read steps of all methods in all cases, as far as the time reaches.

    Args:
        workload: says the device; model, precision and batch size are those of the cases.
        cases: in the order in which they are measured.
        read: runs a task. Default: that of the device in `READERS`.
        clock: returns seconds.
    """
    end, read = clock() + SECONDS, READERS[workload.device] if read is None else read
    found: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    for index, case in enumerate(cases):
        share = (end - clock()) / (len(cases) - index)
        if share <= 0:
            skipped[case.name] = f"the {SECONDS / 60:g} minutes were over"
            continue
        logger.info("grid: %s, %.0f s", case.name, share)
        load = replace(workload, model=case.model, precision=case.precision, batch_size=case.batch_size)
        methods, failed = _measure(case, load, read, clock() + share, clock)
        found[case.name] = {**asdict(case), "methods": methods}
        skipped |= failed
        _free(workload.device)
    figures = tuple(figure for name, case in found.items() for figure in _figures(name, case["methods"]))
    return Row("grid", "training steps of several models", figures, {"cases": found}, skipped)


def rounds_within(once: float, left: float) -> int:
    """Return how many rounds of `once` seconds fit in `left` seconds: from `FEWEST` to `MOST`."""
    return max(FEWEST, min(MOST, int(left / max(once, 1e-9))))


def _measure(
    case: Case, load: Workload, read: Callable[[Task], Reading], until: float, clock: Callable[[], float]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return what each method took, and which ones could not run, with their errors."""
    base = build_model(load)
    weights = tensor_bytes(base.parameters())
    tasks: dict[str, Task] = {}
    own: dict[str, int] = {}
    failed: dict[str, str] = {}
    for name, build in _trainings(case, base, load):
        before = _held(load.device)
        try:
            training = build()
            training.step()
        except Exception as error:  # no memory, or what a compiler cannot do: the others are measured all the same
            failed[f"{case.name}: {name}"] = (
                f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
            )
            continue
        tasks[name], own[name] = training.step, max(_held(load.device) - before, 0)
    readings: dict[str, list[Reading]] = {name: [] for name in tasks}
    gc.collect()
    once, rounds, turn = 0.0, FEWEST, 0
    while turn < WARM_UP + rounds:
        start = clock()
        for name, task in tasks.items():
            readings[name].append(read(task))
        once, turn = clock() - start, turn + 1
        if turn == WARM_UP:
            rounds = rounds_within(once, until - clock())
    return {
        name: {
            "median": statistics.median(reading.seconds for reading in counted),
            "all": [reading.seconds for reading in counted],
            "peak": max(reading.peak for reading in counted),
            "alone": weights + own[name] + max(reading.peak for reading in counted),
        }
        for name, counted in ((name, found[WARM_UP:]) for name, found in readings.items())
    }, failed


def _trainings(case: Case, base: PreTrainedModel, load: Workload) -> Iterator[tuple[str, Callable[[], Training]]]:
    """Yield names in tables, and what builds the training: of a compiled case every method as it is and compiled."""
    for key in COMPILED if case.compiled else COMPARED:
        yield METHODS[key].label, partial(Training, key, base, load)
        if case.compiled:
            yield f"{METHODS[key].label}, compiled", partial(Training, key, base, load, compiled=True)


def _figures(case: str, methods: dict[str, Any]) -> Iterator[Figure]:
    """Yield the ratios of FPS to other methods in time and in memory."""
    for suffix in ("", ", compiled"):
        ours = methods.get(f"{METHODS['fps'].label}{suffix}")
        for other in ("full", "lora"):
            theirs = methods.get(f"{METHODS[other].label}{suffix}")
            if ours and theirs:
                what = f"{case}: FPS{suffix} ÷ {METHODS[other].label}"
                yield Figure(f"{what}, time", ours["median"] / theirs["median"])
                with suppress(ZeroDivisionError):  # the CPU counts no bytes
                    yield Figure(f"{what}, peak", ours["peak"] / theirs["peak"])


def _held(device: str) -> int:
    """Return the bytes that PyTorch's allocator holds."""
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def _free(device: str) -> None:
    """Let go of a case's models and compiled code."""
    torch.compiler.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
