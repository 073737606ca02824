"""A Trainer of transformers on a tiny ViT, and what it leaves in the model."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainingArguments

from tests.support.helpers import bits, images


EXAMPLES = [{"pixel_values": image, "labels": number % 5} for number, image in enumerate(images(12))]


QUIET: dict[str, Any] = {
    "use_cpu": True,
    "per_device_train_batch_size": 4,
    "save_strategy": "no",
    "logging_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}
"""Arguments of any Trainer that works on the CPU and writes down nothing."""


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    defaults = QUIET | {"max_steps": 4, "learning_rate": 0.01, "weight_decay": 0.1}
    return TrainingArguments(str(folder), **(defaults | options))


def trainer(model: nn.Module, folder: Path, callbacks: list[Any] | None = None, **options: Any) -> Trainer:
    return Trainer(
        model, arguments(folder, **options), train_dataset=EXAMPLES, eval_dataset=EXAMPLES, callbacks=callbacks
    )


def dropping(model: nn.Module) -> nn.Module:
    """The same model with dropout, so that a disturbed generator shows in the result."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.2
    return model


def trained_state(model: nn.Module) -> dict[str, bytes]:
    """Values, columns, counts, bias deltas and head."""
    return {name: bits(tensor) for name, tensor in model.state_dict().items()
            if "fps_" in name or "modules_to_save" in name}  # fmt: skip
