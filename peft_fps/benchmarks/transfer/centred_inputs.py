"""Entries that are trained as if their inputs had the mean 0, tried against entries trained as they are.

An entry w of input a changes its neuron's output by w · a, on average by w · E[a]. For the large inputs that FPS
selects this is above all one shift, the same for all images. Trained as w · (a - E[a]), with the bias
b' = b + w · E[a] in place of b, an entry changes what differs between images, and the bias alone shifts them. Both are
the same model: after every step b is b' - w · E[a] again, so that the adapter is an ordinary one.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_fps.benchmarks.transfer.class_scores import gather_moments
from peft_fps.layers.lookup import base_model, entry_layers, fps_layers


BATCHES = 20
"""Batches that the means are taken over."""


@dataclass
class CentredLayer:
    """Entries of a layer with bias deltas.

    Attributes:
        values: `(entries,)`, w.
        bias: `(neurons,)`, b.
        rows: `(entries,)`, the neuron of each entry.
        means: `(entries,)`, E[a] of each entry's input.
        before: `(entries,)`, values before a step.
    """

    values: nn.Parameter
    bias: nn.Parameter
    rows: Tensor
    means: Tensor
    before: Tensor


class CentredInputs(TrainerCallback):
    """Lets an optimizer step as if inputs were centred.

    Args:
        layers: those whose entries have bias deltas beside them.
    """

    def __init__(self, layers: Iterable[CentredLayer]) -> None:
        self.layers = list(layers)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Register the hooks on the optimizer; called by the Trainer."""
        # accelerate wraps the optimizer, and only the one inside has hooks
        optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])
        optimizer.register_step_pre_hook(self._centre_gradients)
        optimizer.register_step_post_hook(self._keep_shift)

    @torch.no_grad()
    def _centre_gradients(self, *_: Any) -> None:
        """Take the gradients of w at constant b', in place of constant b."""
        for layer in self.layers:
            layer.before.copy_(layer.values)
            if layer.values.grad is not None and layer.bias.grad is not None:
                layer.values.grad -= layer.means * layer.bias.grad[layer.rows]

    @torch.no_grad()
    def _keep_shift(self, *_: Any) -> None:
        """Move b by what keeps b' where the step has put it."""
        for layer in self.layers:
            layer.bias.index_add_(0, layer.rows, (layer.before - layer.values) * layer.means)


def centred_inputs(
    model: nn.Module, data: Iterable[Mapping[str, Any]], classes: int, adapter: str = "default"
) -> CentredInputs:
    """Return the callback for all layers of an adapter that have entries and bias deltas.

    Args:
        model: with a selected FPS adapter that is not trained.
        data: batches of `pixel_values` and `labels`; the first ones are used.
        classes: number of classes.
        adapter: its name.
    """
    moments, layers = gather_moments(model, islice(data, BATCHES), classes), []
    for path, layer in entry_layers(fps_layers(base_model(model))).items():
        if adapter in layer.fps_values and adapter in layer.fps_bias:
            values, counts = layer.fps_values[adapter], layer.fps_row_counts[adapter].long()
            means = (moments[path].token_sums / moments[path].tokens)[layer.fps_columns[adapter].long()]
            rows = torch.repeat_interleave(torch.arange(len(counts)), counts)
            before = values.detach().clone()
            layers.append(CentredLayer(values, layer.fps_bias[adapter], rows, means.to(before), before))
    return CentredInputs(layers)
