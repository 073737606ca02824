"""What token selection saves: steps, memory, and forward passes of merged models, at several keep rates."""

import copy
import logging
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from peft_fps.benchmarks.cost.clock import interleave
from peft_fps.benchmarks.cost.figures import Figure, Row, plain
from peft_fps.benchmarks.cost.methods import LORA, TOKEN_METHODS, blocks_of
from peft_fps.benchmarks.cost.random_models import batches, build_model
from peft_fps.benchmarks.cost.sizes import bytes_of
from peft_fps.benchmarks.cost.training_step import Training
from peft_fps.benchmarks.cost.workload import Workload
from peft_fps.benchmarks.malloc import give_back
from peft_fps.benchmarks.tensor_memory import in_own_processes


logger = logging.getLogger(__name__)

ALL_PATCHES = "keep-1"
"""Key of FPS without token selection."""


def measure_tokens(workload: Workload) -> Row:
    """Time steps and forward passes of every keep rate in turn, and count the bytes of steps in own processes.

    Raises:
        ValueError: tokens cannot be selected in the model.
    """
    base = build_model(workload)
    names, blocks = list(TOKEN_METHODS), blocks_of(base)
    steps = {name: Training(name, base, workload) for name in names}
    logger.info("tokens: %d rounds of %d methods", workload.timed_rounds, len(names))
    step = interleave({name: each.step for name, each in steps.items()}, workload.timed_rounds, workload.device)
    del steps
    give_back()
    jobs = [partial(bytes_of, name, workload.in_process()) for name in names]
    held = dict(zip(names, in_own_processes(jobs, workload.processes), strict=True))
    merged = {name: _merged(name, base, workload) for name in names if name not in ("floor", "lora")}
    (batch,) = batches(base, workload.batch_size)
    del batch["labels"]
    tasks: dict[str, Callable[[], object]] = {
        name: partial(_forward, model, batch, workload) for name, model in merged.items()
    }
    inference = interleave(tasks, workload.timed_rounds, workload.device)
    figures = []
    for name in names:
        label = TOKEN_METHODS[name].label
        if name != "lora":
            figures.append(Figure(f"{label} ÷ {LORA}, step", step[name].median / step["lora"].median))
            figures.append(Figure(f"{label} ÷ {LORA}, peak of a step", held[name]["peak"] / held["lora"]["peak"]))
        if name in merged and name != ALL_PATCHES:
            ratio = inference[name].median / inference[ALL_PATCHES].median
            figures.append(Figure(f"{label} ÷ all patches, merged and in inference", ratio))
    raw = {"blocks": blocks, "step": plain(step), "bytes": held, "inference": plain(inference)}
    title = f"token selection in blocks {', '.join(map(str, blocks))}, batch {workload.batch_size}"
    return Row("tokens", title, tuple(figures), raw)


def _merged(name: str, base: PreTrainedModel, workload: Workload) -> Any:
    """Return a method's model merged, with weights of its own, in evaluation mode."""
    model: Any = TOKEN_METHODS[name].build(copy.deepcopy(base), workload)
    with warnings.catch_warnings():  # nothing is saved here
        warnings.filterwarnings("ignore", "The merged model goes on selecting tokens")
        return model.merge_and_unload().eval()


@torch.no_grad()
def _forward(model: Any, batch: dict[str, torch.Tensor], workload: Workload) -> None:
    """Run a forward pass without gradients."""
    with workload.autocast():
        model(**batch)
