"""Training with transformers' Trainer."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_fps.vision.labelled_examples import Collate, LabelledExamples


LOGGED = 10
"""Number of times that the loss is shown."""


class DivergedError(ValueError):
    """Training has led to a loss that is not finite."""


class LogHistory(TrainerCallback):
    """Keeps what a Trainer logs.

    Attributes:
        records: `state.log_history` at the end of training.
    """

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the log; called by the Trainer."""
        self.records = list(state.log_history)


def training_arguments(
    recipe: Mapping[str, Any], images: int, workers: int, output: Path, seed: int, precision: str = "fp32"
) -> TrainingArguments:
    """Return the arguments of the Trainer: as the recipe says, without checkpoints and reports.

    Args:
        recipe: training arguments, `num_train_epochs` and `per_device_train_batch_size` at least.
        images: number of training images.
        workers: processes that prepare images.
        output: any folder that may exist; nothing is written there.
        seed: of the order of the images and of dropout.
        precision: `"fp32"`, or `"bf16"` or `"fp16"` for autocast.
    """
    steps = recipe["num_train_epochs"] * math.ceil(images / recipe["per_device_train_batch_size"])
    return TrainingArguments(
        **recipe,
        output_dir=str(output),
        use_cpu=not torch.accelerator.is_available(),  # bf16 on the CPU has to be asked for
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        seed=seed,
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=torch.cuda.is_available(),
        dataloader_num_workers=workers,
        logging_steps=math.ceil(steps / LOGGED),
        logging_nan_inf_filter=False,
    )


def train(
    model: nn.Module,
    arguments: TrainingArguments,
    examples: LabelledExamples,
    collator: Collate,
    **options: Any,
) -> float:
    """Train the model in place; returns the mean training loss.

    Args:
        model: to train.
        arguments: of the Trainer.
        examples: to train on.
        collator: makes a batch of examples.
        options: further arguments of the Trainer: `callbacks`, `compute_loss_func`.

    Raises:
        DivergedError: the loss is not finite.
    """
    data: Any = examples  # the Trainer takes whatever has a length and items
    trainer = Trainer(model=model, args=arguments, train_dataset=data, data_collator=collator, **options)
    loss = float(trainer.train().training_loss)
    # under mixed precision the Trainer leaves its autocast on the model's forward
    trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    if not math.isfinite(loss):
        raise DivergedError(f"The training loss is {loss}: training diverged. Try a lower --learning-rate.")
    return loss


def calibration_loader(seed: int, batch_size: int, examples: LabelledExamples, collator: Collate, workers: int) -> Any:
    """Return a DataLoader over the training examples, in an order that depends on the seed alone.

    Args:
        seed: the same seed gives the same order.
        batch_size: examples per batch; the last batch may be smaller.
        examples: to load.
        collator: makes a batch of examples.
        workers: processes that prepare examples.
    """
    data: Any = examples
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(
        data,
        batch_size=batch_size,
        shuffle=True,
        generator=generator,
        collate_fn=collator,
        num_workers=workers,
    )


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that require gradients, each once, in the order of `model.parameters()`."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def worker_count(kept: bool) -> int:
    """Return the number of processes that prepare images: none if they are `kept` in memory, else at most 4."""
    return 0 if kept else min(4, os.cpu_count() or 1)
