"""Sums of gradients, and changes in a short training, of each weight."""

from peft_fps.gradients.accumulate import Accumulator, Exact, Streaming
from peft_fps.gradients.backward_pass import BatchLoss, Weight, accumulate_gradients
from peft_fps.gradients.contrastive import contrastive_step
from peft_fps.gradients.gated_training import accumulate_gated_changes
from peft_fps.gradients.losses import Loss, task_loss
from peft_fps.gradients.views import TwoViews
from peft_fps.gradients.weight_training import accumulate_movement


__all__ = [
    "Accumulator",
    "BatchLoss",
    "Exact",
    "Loss",
    "Streaming",
    "TwoViews",
    "Weight",
    "accumulate_gated_changes",
    "accumulate_gradients",
    "accumulate_movement",
    "contrastive_step",
    "task_loss",
]
