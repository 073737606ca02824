"""Bytes of tensors during and between training steps, and of adapters on disk."""

import logging
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from peft_fps.benchmarks.cost.figures import Figure, Row
from peft_fps.benchmarks.cost.methods import LORA, METHODS, PER_NEURON, adapt, adapter_config, fill
from peft_fps.benchmarks.cost.random_models import build_model, copy_model
from peft_fps.benchmarks.cost.training_step import Training
from peft_fps.benchmarks.cost.workload import Workload
from peft_fps.benchmarks.tensor_memory import in_own_processes, living_bytes, peak_bytes, saved_bytes, tensor_bytes
from peft_fps.config import FPSConfig
from peft_fps.vision.training_loop import trained_parameters


logger = logging.getLogger(__name__)

PEAK_TARGETS = {"fps": 0.68, "fps-columns": 0.82}
"""Largest shares of LoRA's peak."""


def measure_memory(workload: Workload) -> Row:
    """Count the bytes of every method, each in its own process."""
    names = list(METHODS)
    logger.info("memory: %d methods, a process each", len(names))
    found = in_own_processes([partial(bytes_of, name, workload.in_process()) for name in names], workload.processes)
    methods = dict(zip(names, found, strict=True))
    figures = [
        Figure(
            f"{METHODS[name].label} ÷ {LORA}, peak of a step",
            methods[name]["peak"] / methods["lora"]["peak"],
            at_most=PEAK_TARGETS.get(name),
        )
        for name in names
        if name.startswith("fps")
    ]
    title = f"tensors of one training step, batch {workload.batch_size}"
    return Row("memory", title, tuple(figures), {"bytes": methods})


def bytes_of(name: str, workload: Workload) -> dict[str, int]:
    """Return the bytes of a method, to be called in a process that has done nothing else.

    Args:
        name: key of the method in `ALL_METHODS`.
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


def measure_files(workload: Workload) -> Row:
    """Save adapters without an output head, and divide their bytes by the number of trained numbers."""
    base = build_model(workload)
    half: Any = copy_model(base)
    half.to(torch.bfloat16)
    ours = FPSConfig(per_neuron=PER_NEURON, importance="magnitude", modules_to_save=[])
    adapted = {
        "FPS, float32": (adapt(base, ours), 6.0),
        "FPS, bfloat16": (adapt(half, ours, autocast_adapter_dtype=False), 4.0),
    } | {
        METHODS[name].label: (adapt(base, adapter_config(name, base, head=False)), None)
        for name in ("shira", "supertuning", "lora")
    }
    logger.info("file: %d adapters", len(adapted))
    figures, raw = [], {}
    for label, (model, target) in adapted.items():
        fill(model)
        trained, size = sum(parameter.numel() for parameter in trained_parameters(model)), file_bytes(model)
        raw[label] = {"bytes": size, "trained": trained}
        figures.append(Figure(label, size / trained, "bytes", at_most=target))
    return Row("file", "adapter_model.safetensors ÷ trained numbers", tuple(figures), raw)


def file_bytes(model: Any) -> int:
    """Return the size of the file that a model's adapter is saved to, in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return (Path(folder) / "adapter_model.safetensors").stat().st_size
