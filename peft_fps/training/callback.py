"""Calibrate on the training data when training starts."""

import logging
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_fps.lookup import active_adapter, adapter_layers
from peft_fps.selecting import calibrate


logger = logging.getLogger(__name__)

OPTIONS = ("loss", "views", "accumulators", "training_mode")
"""Arguments of `calibrate` that a callback passes on."""


class FPSCallback(TrainerCallback):
    """Calibrates the active adapter on the Trainer's own training data, unless it is calibrated or loaded already.

    Resuming from a checkpoint therefore keeps the checkpoint's selection. TRL's trainers call it likewise:
    `SFTTrainer(model, ..., peft_config=FPSConfig(...), callbacks=[FPSCallback()])`.

    Args:
        num_batches: batches to use; the whole training set if None.
        progress: show a progress bar; None follows the Trainer's `disable_tqdm`.
        options: further arguments of `peft_fps.calibrate`, as there: `loss`, `views`, `accumulators`, `training_mode`.

    Raises:
        TypeError: an option that is none of these.
    """

    def __init__(self, num_batches: int | None = None, progress: bool | None = None, **options: Any) -> None:
        unknown = [name for name in options if name not in OPTIONS]
        if unknown:
            raise TypeError(f"FPSCallback got {', '.join(unknown)}, expected only {', '.join(OPTIONS)} besides.")
        self.num_batches = num_batches
        self.progress = progress
        self.options = options

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
            model,
            kwargs["train_dataloader"],
            adapter_name=name,
            num_batches=self.num_batches,
            progress=progress,
            **self.options,
        )
        logger.info("%s", report)
