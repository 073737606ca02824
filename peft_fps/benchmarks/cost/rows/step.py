"""Seconds of a training step."""

import logging

from peft_fps.benchmarks.cost.clock import interleave
from peft_fps.benchmarks.cost.figures import Figure, Row, plain
from peft_fps.benchmarks.cost.methods import LORA, METHODS, columns_used
from peft_fps.benchmarks.cost.random_models import build_model
from peft_fps.benchmarks.cost.training_step import Training
from peft_fps.benchmarks.cost.workload import Workload


logger = logging.getLogger(__name__)

TARGETS = {"fps": (0.74, 0.90), "fps-pytorch": (0.85, 1.00)}
"""Largest shares of a step of full fine-tuning, and of LoRA."""


def measure(workload: Workload) -> Row:
    """Time forward, backward, AdamW and zeroing of every method in turn."""
    base = build_model(workload)
    methods = {}
    for name, method in METHODS.items():
        logger.info("step: preparing %s", method.label)
        methods[name] = Training(name, base, workload)
    logger.info("step: %d rounds of %d methods", workload.timed_rounds, len(methods))
    times = interleave({name: method.step for name, method in methods.items()}, workload.timed_rounds, workload.device)
    figures = []
    for name in (name for name in times if name.startswith("fps")):
        full, lora = TARGETS.get(name, (None, None))
        label, median = METHODS[name].label, times[name].median
        figures += [
            Figure(f"{label} ÷ full fine-tuning", median / times["full"].median, at_most=full),
            Figure(f"{label} ÷ {LORA}", median / times["lora"].median, at_most=lora),
        ]
    used = columns_used(methods["fps"].model)
    return Row(
        "step",
        f"one training step, batch {workload.batch_size}",
        tuple(figures),
        {"seconds": plain(times), "columns_used": used},
    )
