"""What the package's default adds to FPS with biases at one learning rate: rates by kind, and centred inputs."""

import logging
from functools import partial

import torch
from transformers import PreTrainedModel

from peft_fps.benchmarks.cost.clock import interleave
from peft_fps.benchmarks.cost.figures import Figure, Row, plain
from peft_fps.benchmarks.cost.random_models import batches, build_model
from peft_fps.benchmarks.cost.selection_costs import forward_passes
from peft_fps.benchmarks.cost.training_step import Training
from peft_fps.benchmarks.cost.workload import Workload
from peft_fps.benchmarks.tensor_memory import in_own_processes, peak_bytes
from peft_fps.training import CentredSteps, centre_steps, parameter_groups
from peft_fps.training.centring import NUM_BATCHES
from peft_fps.vision.default_training import LOW_RATE


logger = logging.getLogger(__name__)

STEP_TARGET, MEANS_TARGET = 1.03, 1.2
"""Largest multiples of a plain step, and of bare forward passes over the batches that means are taken over."""
NO_RATE = 1e-30
"""Leaves values of float32 as they are, since groups need rates above 0."""


class DefaultTraining(Training):
    """Training of FPS as `peft-fps finetune` trains it.

    Args:
        base: the model to fine-tune, which is not changed.
        workload: batch size and precision.
    """

    def __init__(self, base: PreTrainedModel, workload: Workload) -> None:
        super().__init__("fps", base, workload)
        rates = {"bias_lr": LOW_RATE * NO_RATE, "head_lr": LOW_RATE * NO_RATE}
        groups = parameter_groups(self.model, NO_RATE, **rates)
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        self.data = batches(base, workload.batch_size, NUM_BATCHES)
        self.steps = self._centre()

    def gather_means(self) -> None:
        """Take the means of inputs anew."""
        self.steps.remove()
        self.steps = self._centre()

    def _centre(self) -> CentredSteps:
        assert self.optimizer is not None
        with self.workload.autocast():
            return centre_steps(self.model, self.optimizer, self.data)


def measure_recipe(workload: Workload) -> Row:
    """Time steps of the default and plain ones in turn, the means beside bare forward passes, and count peaks."""
    base = build_model(workload)
    ordinary, default = Training("fps", base, workload), DefaultTraining(base, workload)
    logger.info("recipe: %d rounds of steps", workload.timed_rounds)
    steps = interleave({"plain": ordinary.step, "default": default.step}, workload.timed_rounds, workload.device)
    bare = partial(forward_passes, base.eval(), default.data)

    def forward() -> None:
        with workload.autocast():
            bare()

    logger.info("recipe: %d rounds of means over %d batches", workload.timed_rounds, NUM_BATCHES)
    means = interleave({"forward": forward, "means": default.gather_means}, workload.timed_rounds, workload.device)
    names = ("plain", "default")
    jobs = [partial(step_peak, name, workload.in_process()) for name in names]
    peaks = dict(zip(names, in_own_processes(jobs, workload.processes), strict=True))
    figures = (
        Figure(
            "the default ÷ one rate and no centring, step",
            steps["default"].median / steps["plain"].median,
            at_most=STEP_TARGET,
        ),
        Figure("the default ÷ one rate and no centring, peak of a step", peaks["default"] / peaks["plain"]),
        Figure(
            f"means of inputs ÷ bare forward passes over the same {NUM_BATCHES} batches",
            means["means"].median / means["forward"].median,
            at_most=MEANS_TARGET,
        ),
    )
    raw = {"step": plain(steps), "means": plain(means), "peak_bytes": peaks}
    return Row("recipe", f"what the default adds to training, batch {workload.batch_size}", figures, raw)


def step_peak(name: str, workload: Workload) -> int:
    """Return the peak bytes of a step, to be called in a process that has done nothing else.

    Args:
        name: `"plain"` or `"default"`.
        workload: what to train.
    """
    workload.prepare()
    base = build_model(workload)
    training = DefaultTraining(base, workload) if name == "default" else Training("fps", base, workload)
    training.step()  # from here on there are optimizer states
    return peak_bytes(training.step, workload.device)
