"""The newest evaluation of a training, kept for the adapter's model card."""

from typing import Any

from torch import nn
from transformers import TrainerState

from peft_fps.card import evaluation_at
from peft_fps.layers.lookup import adapter_state, fps_layers, target_layers


def note_evaluation(model: nn.Module, state: TrainerState, step: int, data: Any) -> None:
    """Record the evaluation of a step in the active adapter, for its model card.

    With several active adapters there is no record, because their evaluation belongs to none of them alone.

    Args:
        model: the trained model.
        state: state of the Trainer with the log.
        step: global step of the evaluation.
        data: loader of the evaluation data, or None.
    """
    active = {name for layer in fps_layers(model).values() for name in layer.active_adapters}
    measured = evaluation_at(step, state.log_history, getattr(data, "dataset", None))
    if len(active) == 1 and measured is not None:
        name = active.pop()
        adapter_state(target_layers(model, name), name).evaluation = measured
