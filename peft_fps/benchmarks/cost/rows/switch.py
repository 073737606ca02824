"""Seconds of choosing another adapter that is already loaded, and using it."""

import itertools
import logging

import torch

from peft_fps.benchmarks.cost.clock import interleave
from peft_fps.benchmarks.cost.figures import Figure, Row, plain
from peft_fps.benchmarks.cost.methods import PER_NEURON, fill, fps
from peft_fps.benchmarks.cost.random_models import batches, build_model
from peft_fps.benchmarks.cost.workload import Workload
from peft_fps.config import FPSConfig
from peft_fps.vision.upstream_noise import upstream_deprecations


logger = logging.getLogger(__name__)


def measure(workload: Workload) -> Row:
    """Time `set_adapter` with a forward pass beside a forward pass of the base model."""
    base = build_model(workload)
    model = fps(base, workload).eval()
    with upstream_deprecations():
        model.add_adapter("other", FPSConfig(per_neuron=PER_NEURON, importance="magnitude"))
    model.set_adapter("other")
    fill(model)
    (batch,) = batches(base.eval(), workload.batch_size)
    turns = itertools.cycle(["default", "other"])

    @torch.no_grad()
    def plain_forward() -> None:
        with workload.autocast():
            base(**batch)

    @torch.no_grad()
    def switch() -> None:
        model.set_adapter(next(turns))
        with workload.autocast():
            model(**batch)

    logger.info("switch: %d rounds", workload.timed_rounds)
    times = interleave({"base": plain_forward, "switch": switch}, workload.timed_rounds, workload.device)
    ratio = times["switch"].median / times["base"].median
    figures = (Figure("set_adapter and forward ÷ the base's forward", ratio, at_most=1.05),)
    return Row("switch", f"another loaded adapter, batch {workload.batch_size}", figures, {"seconds": plain(times)})
