"""Calibrate on the training data when training starts."""

import logging
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_fps.lookup import active_adapter, adapter_layers
from peft_fps.selecting import calibrate


logger = logging.getLogger(__name__)


class FPSCallback(TrainerCallback):
    """Calibrates the active adapter on the Trainer's own training data, unless it is calibrated or loaded already.

    Resuming from a checkpoint therefore keeps the checkpoint's selection.

    Args:
        num_batches: batches to use; the whole training set if None.
        progress: show a progress bar; None follows the Trainer's `disable_tqdm`.
    """

    def __init__(self, num_batches: int | None = None, progress: bool | None = None) -> None:
        self.num_batches = num_batches
        self.progress = progress

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Calibrate if need be; called by the Trainer."""
        model: nn.Module = kwargs["model"]
        name = active_adapter(model)
        if all(layer.fps_state[name].selected for layer in adapter_layers(model, name).values()):
            return
        progress = not args.disable_tqdm if self.progress is None else self.progress
        report = calibrate(
            model, kwargs["train_dataloader"], adapter_name=name, num_batches=self.num_batches, progress=progress
        )
        logger.info("%s", report)
