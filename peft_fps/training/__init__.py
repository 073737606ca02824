"""What training needs beyond PEFT: a callback for transformers' `Trainer`, rates, centred steps, stochastic depth.

`callback` coordinates the others while a Trainer runs.

| module | subject |
|---|---|
| `callback` | calibrates when training begins, and notes evaluations |
| `trainers` | runs of a model with the preparation and the loss of its trainer |
| `evaluation_notes` | the newest evaluation, for the model card |
| `parameter_groups`, `optimizer_creation` | learning rates for biases, norms and the head |
| `centred_steps`, `centring` | optimizer steps as if the inputs had the mean 0, and the call that makes them so |
| `centring_choice` | whether a callback centres steps of its own accord |
| `untrained_modules` | whether a training trains what the adapter has |
| `drop_path` | stochastic depth |
"""

from peft_fps.training.callback import FPSCallback
from peft_fps.training.centred_steps import CentredSteps
from peft_fps.training.centring import centre_steps
from peft_fps.training.drop_path import add_drop_path
from peft_fps.training.parameter_groups import parameter_groups


__all__ = ["CentredSteps", "FPSCallback", "add_drop_path", "centre_steps", "parameter_groups"]
