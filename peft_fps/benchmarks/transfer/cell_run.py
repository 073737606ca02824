"""One cell: select, train, evaluate."""

import logging
import math
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import PeftMixedModel, PeftModel
from safetensors.torch import save_model
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, set_seed
from transformers.trainer_utils import IntervalStrategy

from peft_fps.benchmarks.tensor_memory import peak_bytes
from peft_fps.benchmarks.transfer.arms import ARMS
from peft_fps.benchmarks.transfer.attached_model import attach
from peft_fps.benchmarks.transfer.cells import Cell, Record, Setting
from peft_fps.benchmarks.transfer.linear_head_cell import run_linear_head
from peft_fps.benchmarks.transfer.soft_score import extra_operations
from peft_fps.benchmarks.transfer.tasks import Task, load_task
from peft_fps.checkpoint import save_adapter
from peft_fps.config import FPSConfig
from peft_fps.targets.base_parameters import count_base_parameters
from peft_fps.training import FPSCallback
from peft_fps.vision.classifiers import classifier
from peft_fps.vision.labelled_examples import Collate
from peft_fps.vision.prediction import Predictor, accuracy
from peft_fps.vision.training_loop import (
    DivergedError,
    calibration_loader,
    train,
    trained_parameters,
    training_arguments,
)


logger = logging.getLogger(__name__)

RECIPE: dict[str, Any] = {
    "weight_decay": 0.0,
    "max_grad_norm": 0.0,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
}
"""How every method is trained, besides the learning rate: AdamW, as GPS trains on VTAB-1k."""


def run_cell(cell: Cell, setting: Setting) -> Record:
    """Run one cell; the same cell gives the same accuracies on the same machine.

    Raises:
        ValueError: the task, the model or the method's budget cannot be used.
    """
    task = load_task(cell.task, setting)
    if cell.learning_rate is None:
        return run_linear_head(cell, setting, task)
    set_seed(cell.seed)
    base = task.load_base(cell.seed)
    backbone = count_base_parameters(base)
    collator = task.collator(base)
    head = sum(p.numel() for p in classifier(base).parameters())
    training = ARMS[cell.method].training
    model, selecting, selection_bytes = _prepare(cell, setting, task, base, collator)
    trained = sum(p.numel() for p in trained_parameters(model))
    held = {
        "select": selection_bytes,
        "train": _training_bytes(model, setting, task, collator),
        "adapter": _file_bytes(model),  # now, since values that have diverged cannot be saved
    }
    operations = extra_operations(model, collator([task.splits["train"][0]]))

    recipe = {
        **RECIPE,
        **training.recipe,
        "learning_rate": cell.learning_rate,
        "num_train_epochs": setting.epochs,
        "per_device_train_batch_size": setting.batch_size,
    }
    images, nowhere = len(task.splits["train"]), Path(tempfile.gettempdir())
    arguments = training_arguments(recipe, images, 0, nowhere, cell.seed, setting.precision)
    arguments.disable_tqdm, arguments.logging_strategy = True, IntervalStrategy.NO
    centred = training.centred
    callbacks: list[TrainerCallback] = [] if centred is False else [FPSCallback(centred=centred)]
    optimizers = training.optimizers(model, arguments)
    start, loss = time.perf_counter(), None
    try:
        loss = train(model, arguments, task.splits["train"], collator, callbacks=callbacks, optimizers=optimizers)
    except DivergedError:
        logger.warning("%s diverged", cell)  # whatever it predicts now is its accuracy
    seconds = {"select": selecting, "train": time.perf_counter() - start}
    predictor = Predictor(arguments.device, setting.batch_size, collator, workers=0)
    reached = {part: _accuracy(predictor, model, task, part) for part in ("validation", "test")}
    return Record(
        cell=cell,
        group=task.group,
        **reached,
        trained=trained - head,
        head=head,
        backbone=backbone,
        seconds=seconds,
        bytes=held,
        loss=loss,
        operations=operations,
    )


def _prepare(
    cell: Cell, setting: Setting, task: Task, base: PreTrainedModel, collator: Collate
) -> tuple[nn.Module, float, int]:
    """Return the model, its entries selected, the seconds that took, and the peak of bytes on one batch."""
    arm, start = ARMS[cell.method], time.perf_counter()
    if arm.build is None:
        return base.requires_grad_(True), 0.0, 0
    model, held = attach(arm, base, cell.share, cell.seed), 0
    config = model.peft_config["default"]
    if isinstance(config, FPSConfig) and config.needs_calibration:
        held = peak_bytes(lambda: select(model, cell, setting, task, collator, 1))
        start = time.perf_counter()
        select(model, cell, setting, task, collator)
    return model, time.perf_counter() - start, held


def select(
    model: Any, cell: Cell, setting: Setting, task: Task, collator: Collate, batches: int | None = None
) -> None:
    """Choose the entries of an adapter that is not trained, as the cell's method does.

    Args:
        model: with the adapter.
        cell: gives method and seed.
        setting: gives the batch size.
        task: whose training images are used.
        collator: makes batches.
        batches: stop after so many.

    Raises:
        ValueError: the method selects from more images than the task has for training.
    """
    arm, config, train_split = ARMS[cell.method], model.peft_config["default"], task.splits["train"]
    size = setting.batch_size
    if arm.images is not None:
        if arm.images > len(train_split):
            raise ValueError(
                f"{cell.method} selects from {arm.images} images, expected at most the {len(train_split)} training "
                f"images of the task {cell.task!r}. Leave the method out, or the task with --only."
            )
        size = math.gcd(arm.images, size)  # whole batches of exactly these images
        batches = min(batches or arm.images, arm.images // size)
    set_seed(cell.seed)
    loader = calibration_loader(cell.seed, size, train_split, collator, workers=0)
    data = islice(loader, batches)
    views = None
    if config.loss == "contrastive" or arm.augmented:
        if task.views is None:
            raise ValueError(
                f"{cell.method} sees augmented images, and the task {task.name!r} holds texts, expected a method that "
                "does not. Take the one with cross-entropy, or leave it out."
            )
        views = task.views()
    if arm.augmented:
        assert views is not None
        pairs = (batch | {"pixel_values": views(batch["pixel_values"])} for batch in data)
        model.calibrate(({k: v for k, v in pair.items() if k != "labels"} for pair in pairs), progress=False)
    else:
        model.calibrate(data, views=views, progress=False)


def _training_bytes(model: nn.Module, setting: Setting, task: Task, collator: Collate) -> int:
    """Return the peak of bytes of a step, AdamW's state included; at a learning rate of 0, which changes nothing."""
    images = task.splits["train"]
    batch = collator([images[row] for row in range(min(setting.batch_size, len(images)))])

    def step() -> None:
        optimizer = torch.optim.AdamW(trained_parameters(model), lr=0.0, weight_decay=0.0)
        with torch.autocast("cpu", torch.bfloat16, enabled=setting.precision == "bf16"):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()

    model.train()
    held = peak_bytes(step)
    model.zero_grad()
    return held


def _accuracy(predictor: Predictor, model: nn.Module, task: Task, part: str) -> float:
    """Return the accuracy on a split; logits that are not numbers count as 0."""
    logits = predictor.logits(model, task.splits[part], f"{task.name}, {part}")
    return accuracy(logits.nan_to_num(), task.splits[part].labels)


def _file_bytes(model: nn.Module) -> int:
    """Return the size of the safetensors files that a model or its adapter is saved to, in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(model, PeftModel | PeftMixedModel):
            save_adapter(model, Path(folder) / "adapter")
        else:
            save_model(model, str(Path(folder) / "model.safetensors"))
        return sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors"))
