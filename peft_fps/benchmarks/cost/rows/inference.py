"""Seconds of a forward pass with an adapter that is not merged."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from peft_fps.benchmarks.cost.clock import interleave
from peft_fps.benchmarks.cost.figures import Figure, Row, plain
from peft_fps.benchmarks.cost.methods import METHODS
from peft_fps.benchmarks.cost.random_models import batches, build_model
from peft_fps.benchmarks.cost.workload import Workload


logger = logging.getLogger(__name__)

TARGETS = {1: 1.35, 32: 1.05}
"""Largest multiples of the base's time by batch size."""


def measure(workload: Workload) -> Row:
    """Time forward passes without gradients of the base, of FPS and of LoRA in turn."""
    base = build_model(workload).eval()
    models: dict[str, Any] = {name: METHODS[name].build(base, workload).eval() for name in ("fps", "lora")}
    figures, raw = [], {}
    for size, target in TARGETS.items():
        (batch,) = batches(base, size)
        del batch["labels"]
        tasks: dict[str, Callable[[], object]] = {
            name: partial(_forward, model, batch, workload) for name, model in {"base": base, **models}.items()
        }
        rounds = workload.short_rounds if size == 1 else workload.timed_rounds
        logger.info("inference: batch %d, %d rounds", size, rounds)
        times = interleave(tasks, rounds, workload.device)
        raw[f"batch {size}"] = plain(times)
        for name, bound in (("fps", target), ("lora", None)):
            ratio = times[name].median / times["base"].median
            figures.append(Figure(f"{METHODS[name].label} ÷ the base, batch {size}", ratio, at_most=bound))
    return Row("inference", "forward pass, adapter active and not merged", tuple(figures), {"seconds": raw})


@torch.no_grad()
def _forward(model: Any, batch: dict[str, torch.Tensor], workload: Workload) -> None:
    with workload.autocast():
        model(**batch)
