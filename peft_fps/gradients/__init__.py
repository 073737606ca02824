"""Sums of gradients, and changes in a short training, of each weight.

| module | subject |
|---|---|
| `accumulate` | sums over batches, one accumulator per module |
| `losses` | the loss of the task |
| `contrastive`, `views` | the supervised contrastive loss, and two augmented views of every image |
| `backward_pass` | backward passes over data that sum up functions of gradients |
| `hooks` | hooks that hand over one gradient at a time |
| `weight_training` | changes of weights in a short full fine-tuning |
| `gated_training`, `gates` | changes of weights under an L0 penalty, and their hard-concrete gates |
| `trial` | short training that is undone |
"""

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
