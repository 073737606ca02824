"""Bytes of tensors during and between training steps."""

import logging
from functools import partial

from peft_fps.benchmarks.cost.figures import Figure, Row
from peft_fps.benchmarks.cost.methods import LORA, METHODS
from peft_fps.benchmarks.cost.random_models import build_model
from peft_fps.benchmarks.cost.training_step import Training
from peft_fps.benchmarks.cost.workload import Workload
from peft_fps.benchmarks.tensor_memory import in_own_processes, living_bytes, peak_bytes, saved_bytes, tensor_bytes


logger = logging.getLogger(__name__)

TARGETS = {"fps": 0.68, "fps-columns": 0.82}
"""Largest shares of LoRA's peak."""


def measure(workload: Workload) -> Row:
    """Count the bytes of every method, each in its own process."""
    names = list(METHODS)
    logger.info("memory: %d methods, a process each", len(names))
    found = in_own_processes([partial(bytes_of, name, workload.in_process()) for name in names], workload.processes)
    methods = dict(zip(names, found, strict=True))
    figures = [
        Figure(
            f"{METHODS[name].label} ÷ {LORA}, peak of a step",
            methods[name]["peak"] / methods["lora"]["peak"],
            at_most=TARGETS.get(name),
        )
        for name in names
        if name.startswith("fps")
    ]
    title = f"tensors of one training step, batch {workload.batch_size}"
    return Row("memory", title, tuple(figures), {"bytes": methods})


def bytes_of(name: str, workload: Workload) -> dict[str, int]:
    """Return the bytes of a method, to be called in a process that has done nothing else.

    Args:
        name: key of the method in `METHODS`.
        workload: what to train.

    Returns:
        `peak` of a step above what was there before it, `saved` for backward by the forward pass (each storage once,
        parameters left out), `rest`: all tensors between steps but the batch, and `parameters`: the model's, which are
        part of `rest`.
    """
    workload.prepare()
    training = Training(name, build_model(workload), workload)
    training.step()  # from here on there are optimizer states
    peak = peak_bytes(training.step, workload.device)
    saved = saved_bytes(training.model, training.loss)
    rest = living_bytes() - tensor_bytes({id(t): t for t in training.batch.values()}.values())
    return {"peak": peak, "saved": saved, "rest": rest, "parameters": tensor_bytes(training.model.parameters())}
