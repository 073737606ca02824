"""The best epoch: weights and their running average are scored after every epoch, and the best are kept."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_fps.vision.training_loop import trained_parameters


Evaluate = Callable[[nn.Module], float]

RAW, AVERAGED = "raw", "averaged"


class Average:
    """An exponential running average of the parameters that are trained.

    Args:
        model: whose parameters that require gradients are averaged, from their present values on.
        decay: what stays of the average at each update.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.parameters = trained_parameters(model)
        self.values = [parameter.detach().clone() for parameter in self.parameters]
        self._mix = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self) -> None:
        """Mix the present values into the average."""
        self._mix(self.values, [parameter.detach() for parameter in self.parameters], None)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average into the model for the block."""
        present = copies(self.parameters)
        put(self.parameters, self.values)
        try:
            yield
        finally:
            put(self.parameters, present)


class BestEpoch(TrainerCallback):
    """Scores the model after every epoch and keeps the best values of its trained parameters in memory.

    The earliest wins a tie, raw weights before averaged ones.

    Args:
        score: of a model, larger is better.
        decay: of the running average that competes; None without one.

    Attributes:
        history: the epoch, and the score of the raw and of the averaged weights.
        best: the entry of the history with the best score; None before the first epoch has ended.
        weights: `"raw"` or `"averaged"`, which of its two scores that was.
    """

    def __init__(self, score: Evaluate, decay: float | None) -> None:
        self.score, self.decay = score, decay
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None
        self.weights = RAW
        self._average: Average | None = None
        self._kept: list[Tensor] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the average; called by the Trainer."""
        if self.decay is not None:
            self._average = Average(kwargs["model"], self.decay)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Update the average; called by the Trainer."""
        if self._average is not None:
            self._average.update()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Evaluate the model; called by the Trainer."""
        model = kwargs["model"]
        self.history.append({"epoch": round(state.epoch or 0)})
        self._compete(model, RAW)
        if self._average is not None:
            with self._average.applied():
                self._compete(model, AVERAGED)

    def restore(self, model: nn.Module) -> None:
        """Set the trained parameters to the best values so far."""
        put(trained_parameters(model), self._kept)

    def _compete(self, model: nn.Module, weights: str) -> None:
        """Evaluate the model, and keep its trained parameters if they are the best so far."""
        entry = self.history[-1]
        entry[weights] = self.score(model)
        if self.best is None or entry[weights] > self.best[self.weights]:
            self.best, self.weights, self._kept = entry, weights, copies(trained_parameters(model))


def copies(parameters: list[nn.Parameter]) -> list[Tensor]:
    """Return copies of the values of parameters."""
    return [parameter.detach().clone() for parameter in parameters]


@torch.no_grad()
def put(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    """Copy values into parameters, in place."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
