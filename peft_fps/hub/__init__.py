"""Adapters on the Hugging Face Hub: pushes, and model cards with a picture of the selection."""

from peft_fps.hub.picture_card import write_card
from peft_fps.hub.pushing import push_adapter


__all__ = ["push_adapter", "write_card"]
