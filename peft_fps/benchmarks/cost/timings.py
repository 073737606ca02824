"""Seconds of training steps, merging, switching, forward passes and attaching, beside other methods."""

import itertools
import logging
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model

from peft_fps.benchmarks.cost.clock import Times, interleave
from peft_fps.benchmarks.cost.figures import Figure, Row, plain
from peft_fps.benchmarks.cost.methods import LORA, METHODS, PER_NEURON, adapter_config, columns_used, fill, fps
from peft_fps.benchmarks.cost.random_models import batches, build_model, copy_model
from peft_fps.benchmarks.cost.training_step import Training
from peft_fps.benchmarks.cost.workload import Workload
from peft_fps.config import FPSConfig
from peft_fps.vision.upstream_noise import upstream_deprecations


logger = logging.getLogger(__name__)

STEP_TARGETS = {"fps": (0.74, 0.90), "fps-pytorch": (0.85, 1.00)}
"""Largest shares of a step of full fine-tuning, and of LoRA."""
MERGE_TARGETS = {"lora": 0.2, "supertuning": 1.2}
"""Largest shares of another method's time."""
INFERENCE_TARGETS = {1: 1.35, 32: 1.05}
"""Largest multiples of the base's time by batch size."""
ATTACHING_ROUNDS, LONGEST_ATTACHING = 3, 1.0
"""Number of rounds, and seconds."""


def measure_steps(workload: Workload) -> Row:
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
        full, lora = STEP_TARGETS.get(name, (None, None))
        label, median = METHODS[name].label, times[name].median
        figures += [
            Figure(f"{label} ÷ full fine-tuning", median / times["full"].median, at_most=full),
            Figure(f"{label} ÷ {LORA}", median / times["lora"].median, at_most=lora),
        ]
    title = f"one training step, batch {workload.batch_size}"
    raw = {"seconds": plain(times), "columns_used": columns_used(methods["fps"].model)}
    return Row("step", title, tuple(figures), raw)


def measure_merging(workload: Workload) -> Row:
    """Time merging and unmerging of whole adapters in turn."""
    base = build_model(workload)
    tasks: dict[str, Callable[[], object]] = {}
    for name in ("fps", *MERGE_TARGETS):
        model: Any = METHODS[name].build(base, workload).eval()
        tasks[f"{name}, merge"], tasks[f"{name}, unmerge"] = model.merge_adapter, model.unmerge_adapter
    logger.info("merge: %d rounds", workload.short_rounds)
    times = interleave(tasks, workload.short_rounds, workload.device)
    figures = tuple(
        Figure(
            f"FPS ÷ {METHODS[other].label}, {verb}",
            times[f"fps, {verb}"].median / times[f"{other}, {verb}"].median,
            at_most=target,
        )
        for other, target in MERGE_TARGETS.items()
        for verb in ("merge", "unmerge")
    )
    return Row("merge", "merging and unmerging a whole adapter", figures, {"seconds": plain(times)})


def measure_switching(workload: Workload) -> Row:
    """Time `set_adapter` with a forward pass beside a forward pass of the base model."""
    base = build_model(workload)
    model = fps(base, workload).eval()
    with upstream_deprecations():
        model.add_adapter("other", FPSConfig(per_neuron=PER_NEURON, importance="magnitude"))
    model.set_adapter("other")
    fill(model)
    (batch,) = batches(base.eval(), workload.batch_size)
    turns = itertools.cycle(["default", "other"])

    def switch() -> None:
        model.set_adapter(next(turns))
        _forward(model, batch, workload)

    logger.info("switch: %d rounds", workload.timed_rounds)
    tasks: dict[str, Callable[[], object]] = {"base": partial(_forward, base, batch, workload), "switch": switch}
    times = interleave(tasks, workload.timed_rounds, workload.device)
    ratio = times["switch"].median / times["base"].median
    figures = (Figure("set_adapter and forward ÷ the base's forward", ratio, at_most=1.05),)
    return Row("switch", f"another loaded adapter, batch {workload.batch_size}", figures, {"seconds": plain(times)})


def measure_inference(workload: Workload) -> Row:
    """Time forward passes without gradients of the base, of FPS and of LoRA in turn; nothing is merged."""
    base = build_model(workload).eval()
    models: dict[str, Any] = {name: METHODS[name].build(base, workload).eval() for name in ("fps", "lora")}
    figures, raw = [], {}
    for size, target in INFERENCE_TARGETS.items():
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


def measure_attaching(workload: Workload) -> Row:
    """Time `get_peft_model` and `PeftModel.from_pretrained` on models that are there already."""
    base = build_model(workload)
    seconds: dict[str, list[float]] = {}
    logger.info("attach: %d rounds", ATTACHING_ROUNDS)
    with tempfile.TemporaryDirectory() as root:
        for _ in range(ATTACHING_ROUNDS):
            for name in ("fps", "lora"):
                config: PeftConfig = FPSConfig(per_neuron=PER_NEURON) if name == "fps" else adapter_config(name, base)
                folder, label = Path(root) / name, METHODS[name].label
                with upstream_deprecations():
                    fresh = copy_model(base)
                    start = time.perf_counter()
                    model = get_peft_model(fresh, config)
                    seconds.setdefault(f"{label}, get_peft_model", []).append(time.perf_counter() - start)
                    model.save_pretrained(str(folder))
                    fresh = copy_model(base)
                    start = time.perf_counter()
                    PeftModel.from_pretrained(fresh, folder)
                    seconds.setdefault(f"{label}, from_pretrained", []).append(time.perf_counter() - start)
    times = {label: Times(tuple(found)) for label, found in seconds.items()}
    figures = tuple(
        Figure(label, found.median, "s", at_most=LONGEST_ATTACHING if label.startswith("FPS") else None)
        for label, found in times.items()
    )
    return Row("attach", "a new adapter, and a saved one", figures, {"seconds": plain(times)})


@torch.no_grad()
def _forward(model: Any, batch: dict[str, torch.Tensor], workload: Workload) -> None:
    """Run a forward pass without gradients."""
    with workload.autocast():
        model(**batch)
