"""What training needs beyond PEFT: a callback for transformers' `Trainer`, parameter groups, stochastic depth."""

from peft_fps.training.callback import FPSCallback
from peft_fps.training.drop_path import add_drop_path
from peft_fps.training.parameter_groups import parameter_groups


__all__ = ["FPSCallback", "add_drop_path", "parameter_groups"]
