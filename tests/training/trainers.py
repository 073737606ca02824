"""A Trainer of transformers on a tiny ViT, and what it leaves in the model."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
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


def trained_by(model: nn.Module) -> list[nn.Parameter]:
    """What an optimizer of the model is given."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def noted(made: Trainer, name: str) -> list[Any]:
    """Starts a list of an input of every training step."""
    seen: list[Any] = []
    step = made.training_step

    def watched(model: nn.Module, inputs: Any, *rest: Any) -> Any:
        seen.append(inputs[name])
        return step(model, inputs, *rest)

    made.training_step = watched  # type: ignore[method-assign]
    return seen


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


def assert_equal_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
