"""What training needs beyond PEFT: a callback for transformers' `Trainer`, rates, centred steps, stochastic depth."""

from peft_fps.training.callback import FPSCallback
from peft_fps.training.centred_steps import CentredSteps
from peft_fps.training.centring import centre_steps
from peft_fps.training.drop_path import add_drop_path
from peft_fps.training.parameter_groups import parameter_groups


__all__ = ["CentredSteps", "FPSCallback", "add_drop_path", "centre_steps", "parameter_groups"]
