"""A learning rate for every entry, tried against one for all: smaller where the input is large.

AdamW moves every entry by about the learning rate, and the neuron's output by that times the input. In inverse
proportion to the input's root mean square, every entry moves its neuron's output alike.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_fps.benchmarks.transfer.class_scores import gather_moments
from peft_fps.layers.lookup import base_model, entry_layers, fps_layers


class EntryRates(TrainerCallback):
    """Multiplies what the optimizer changes by a factor for every number; weight decay included.

    Args:
        factors: by parameter, each of its shape.
    """

    def __init__(self, factors: Mapping[nn.Parameter, Tensor]) -> None:
        self.factors = factors
        self.before: dict[nn.Parameter, Tensor] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Register the hooks on the optimizer; called by the Trainer."""
        # accelerate wraps the optimizer, and only the one inside has hooks
        optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])
        optimizer.register_step_pre_hook(self._remember)
        optimizer.register_step_post_hook(self._scale)

    @torch.no_grad()
    def _remember(self, *_: Any) -> None:
        """Keep the values before a step."""
        self.before = {parameter: parameter.detach().clone() for parameter in self.factors}

    @torch.no_grad()
    def _scale(self, *_: Any) -> None:
        """Scale what the step has changed."""
        for parameter, before in self.before.items():
            parameter.copy_(before + self.factors[parameter] * (parameter - before))


def by_input(
    model: nn.Module, data: Iterable[Mapping[str, Any]], classes: int, adapter: str = "default"
) -> EntryRates:
    """Return rates in inverse proportion to the root mean square of each entry's input, with the geometric mean 1.

    Args:
        model: with a selected FPS adapter that is not trained.
        data: batches of `pixel_values` and `labels`.
        classes: number of classes.
        adapter: its name.
    """
    moments = gather_moments(model, data, classes)
    logs = {}
    for path, layer in entry_layers(fps_layers(base_model(model))).items():
        if adapter in layer.fps_values:
            found = moments[path]
            # an input that is always zero gives no gradient, so that its rate does not matter
            squares = (found.token_squares / found.tokens)[layer.fps_columns[adapter].long()]
            logs[layer.fps_values[adapter]] = -0.5 * squares.clamp_min(torch.finfo(torch.float32).tiny).log()
    entries = sum(log.numel() for log in logs.values())
    middle = math.fsum(log.sum().item() for log in logs.values()) / entries
    return EntryRates({values: (log - middle).exp().to(values) for values, log in logs.items()})
