"""Whether a training trains what the adapter has: it is not merged, and its modules get gradients."""

import warnings
from typing import TYPE_CHECKING

from torch import nn

from peft_fps.base.sharded import is_partitioned, is_sharded
from peft_fps.layers.lookup import adapter_layers


if TYPE_CHECKING:
    from transformers import Trainer  # imports datasets, which takes seconds


SHOWN = 20
"""How many modules a warning names at most."""


def check_unmerged(model: nn.Module, adapter_name: str) -> None:
    """Raise ValueError if a layer of an adapter is merged: it computes with the base weight, and trains nothing."""
    for path, layer in adapter_layers(model, adapter_name).items():
        if layer.merged:
            raise ValueError(
                f"{path}: {', '.join(map(repr, layer.merged_adapters))} is merged, expected an unmerged layer to "
                f"train adapter {adapter_name!r}: a merged one computes with its base weight alone, so that changes "
                "get no gradient. Call model.unmerge_adapter() first. Nothing was changed."
            )


class UntrainedModules:
    """The modules of an adapter that have got no gradient in any step so far.

    Once all have got one, a look costs nothing.

    Args:
        model: model with the adapter.
        adapter_name: name of the adapter.
        trainer: with DeepSpeed or FSDP, whose gradients are not in the parameters, there is nothing to look at. None
            if something else trains.
    """

    def __init__(self, model: nn.Module, adapter_name: str, trainer: "Trainer | None" = None) -> None:
        self._adapter_name = adapter_name
        self._steps = 0
        trained = {
            path: [p for p in layer.adapter_parameters(adapter_name) if p.requires_grad and p.numel()]
            for path, layer in adapter_layers(model, adapter_name).items()
        }
        self._trained = {path: parameters for path, parameters in trained.items() if parameters}
        elsewhere = trainer is not None and (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled)
        if elsewhere or any(is_sharded(p) or is_partitioned(p) for held in trained.values() for p in held):
            self._trained = {}
        self._waiting = dict(self._trained)

    def look(self) -> None:
        """Take note of a step, when its gradients are there and the optimizer has not used them."""
        if self._waiting:
            self._steps += 1
            self._waiting = {
                path: parameters
                for path, parameters in self._waiting.items()
                if not any(p.grad is not None and bool(p.grad.any()) for p in parameters)
            }

    def warn(self) -> None:
        """Name the modules without a gradient, if there was a step, and others have got one. Look no further."""
        waiting, trained = list(self._waiting), len(self._trained)
        self._waiting, self._trained = {}, {}
        # without any gradient at all, something else holds them, as optimizers do that step during backward
        if not self._steps or not waiting or len(waiting) == trained:
            return
        named = ", ".join(waiting[:SHOWN]) + (f" and {len(waiting) - SHOWN} more" if len(waiting) > SHOWN else "")
        steps = "the one step" if self._steps == 1 else f"all {self._steps:,} steps"
        warnings.warn(
            f"{len(waiting)} of {trained} modules of adapter {self._adapter_name!r} got no gradient in {steps} of "
            f"this training, or only zeros, and were not trained: {named}. Either the loss depends on them in no way "
            "that has a gradient (the model does not use their output, or only through a top-k or a detach), or no "
            "token came to them (experts). Leave them out with FPSConfig(exclude_modules=...), so that their part of "
            "the budget goes to the others.",
            stacklevel=3,
        )
