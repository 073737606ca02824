"""Seconds of folding an adapter into the weights and of taking it out again."""

import logging
from collections.abc import Callable
from typing import Any

from peft_fps.benchmarks.cost.clock import interleave
from peft_fps.benchmarks.cost.figures import Figure, Row, plain
from peft_fps.benchmarks.cost.methods import LORA, METHODS
from peft_fps.benchmarks.cost.random_models import build_model
from peft_fps.benchmarks.cost.workload import Workload


logger = logging.getLogger(__name__)

OTHERS = {"lora": 0.2, "supertuning": 1.2}
"""Largest shares of another method's time."""


def measure(workload: Workload) -> Row:
    """Time merging and unmerging of whole adapters in turn."""
    base = build_model(workload)
    tasks: dict[str, Callable[[], object]] = {}
    for name in ("fps", *OTHERS):
        model: Any = METHODS[name].build(base, workload).eval()
        tasks[f"{name}, merge"], tasks[f"{name}, unmerge"] = model.merge_adapter, model.unmerge_adapter
    logger.info("merge: %d rounds", workload.short_rounds)
    times = interleave(tasks, workload.short_rounds, workload.device)
    labels = {"lora": LORA, "supertuning": METHODS["supertuning"].label}
    figures = tuple(
        Figure(
            f"FPS ÷ {labels[other]}, {verb}",
            times[f"fps, {verb}"].median / times[f"{other}, {verb}"].median,
            at_most=target,
        )
        for other, target in OTHERS.items()
        for verb in ("merge", "unmerge")
    )
    return Row("merge", "merging and unmerging a whole adapter", figures, {"seconds": plain(times)})
