"""Bytes of an adapter on disk."""

import logging
import tempfile
from pathlib import Path
from typing import Any

import torch

from peft_fps.benchmarks.cost.figures import Figure, Row
from peft_fps.benchmarks.cost.methods import METHODS, PER_NEURON, adapt, adapter_config, fill, trainable
from peft_fps.benchmarks.cost.random_models import build_model, copy_model
from peft_fps.benchmarks.cost.workload import Workload
from peft_fps.config import FPSConfig


logger = logging.getLogger(__name__)


def measure(workload: Workload) -> Row:
    """Save adapters without an output head, and divide their bytes by the number of trained numbers."""
    base = build_model(workload)
    half: Any = copy_model(base)
    half.to(torch.bfloat16)
    adapted = {
        "FPS, float32": (adapt(base, _ours()), 6.0),
        "FPS, bfloat16": (adapt(half, _ours(), autocast_adapter_dtype=False), 4.0),
    } | {
        METHODS[name].label: (adapt(base, adapter_config(name, base, head=False)), None)
        for name in ("shira", "supertuning", "lora")
    }
    logger.info("file: %d adapters", len(adapted))
    figures, raw = [], {}
    for label, (model, target) in adapted.items():
        fill(model)
        trained, size = sum(parameter.numel() for parameter in trainable(model)), file_bytes(model)
        raw[label] = {"bytes": size, "trained": trained}
        figures.append(Figure(label, size / trained, "bytes", at_most=target))
    return Row("file", "adapter_model.safetensors ÷ trained numbers", tuple(figures), raw)


def file_bytes(model: Any) -> int:
    """Return the size of the file that a model's adapter is saved to."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return (Path(folder) / "adapter_model.safetensors").stat().st_size


def _ours() -> FPSConfig:
    return FPSConfig(per_neuron=PER_NEURON, importance="magnitude", modules_to_save=[])
