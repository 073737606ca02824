"""How `peft-fps finetune` trains without a preset, and how it looks for a learning rate."""

from typing import Any


RECIPE: dict[str, Any] = {
    "learning_rate": 1e-2,
    "weight_decay": 0.0,
    "adam_beta2": 0.95,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "num_train_epochs": 30,
    "per_device_train_batch_size": 32,
}
"""How to train without a preset: arguments of transformers' `TrainingArguments`."""

LOW_RATE = 1 / 3
"""Learning rate of biases and of the head without a preset, as a multiple of that of selected weights."""

TRIED_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
"""What `--learning-rate auto` tries: half a decade apart, around what suits FPS."""

LEAST_STEPS, MOST_STEPS = 50, 200
"""Of a trial of a rate, which takes the steps of one epoch otherwise, and never more than the training has."""

BATCH = RECIPE["per_device_train_batch_size"]
"""Images per step."""

TRAINING_ARGUMENTS = {
    "learning_rate": "learning_rate",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
}
"""Options that are training arguments, and their names there."""
