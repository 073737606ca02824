"""What a transformers `Trainer` needs beyond PEFT."""

from peft_fps.training.callback import FPSCallback


__all__ = ["FPSCallback"]
