"""How an arm is trained beyond what all arms have in common: the package's default, and its parts alone."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import Trainer, TrainingArguments

from peft_fps.training.parameter_groups import parameter_groups
from peft_fps.vision.default_training import LOW_RATE, RECIPE


@dataclass(frozen=True)
class ArmTraining:
    """A way to train an adapter; the defaults are how every method is trained.

    Attributes:
        bias_rate: learning rate of bias deltas as a multiple of that of entries.
        head_rate: learning rate of the output head as a multiple of that of entries.
        centred: whether entries are trained as if their inputs had the mean 0; None: where possible, as the command.
        recipe: training arguments that differ.
    """

    bias_rate: float = 1.0
    head_rate: float = 1.0
    centred: bool | None = False
    recipe: Mapping[str, Any] = field(default_factory=dict)

    def optimizers(self, model: nn.Module, arguments: TrainingArguments) -> tuple[Any, None]:
        """Return the Trainer's own optimizer with groups of the rates, None where all is trained at one rate."""
        if self.bias_rate == self.head_rate == 1:
            return None, None
        rate = arguments.learning_rate
        groups = parameter_groups(model, rate, bias_lr=self.bias_rate * rate, head_lr=self.head_rate * rate)
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
        return kind([group | {"weight_decay": arguments.weight_decay} for group in groups], **options), None


LOW_RATES = ArmTraining(LOW_RATE, LOW_RATE, recipe={"adam_beta2": RECIPE["adam_beta2"]})
"""What keeps the first steps from overshooting: biases and head move less, and large gradients are soon forgotten."""

CENTRED = ArmTraining(centred=True)
"""Centred inputs alone."""

DEFAULT = ArmTraining(LOW_RATE, LOW_RATE, None, LOW_RATES.recipe)
"""Both, which is how `peft-fps finetune` trains."""
