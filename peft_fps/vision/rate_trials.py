"""A learning rate chosen by short trainings that are undone, each judged on the validation images."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers.trainer_utils import IntervalStrategy

from peft_fps.vision.default_training import LEAST_STEPS, MOST_STEPS, TRIED_RATES
from peft_fps.vision.finetune_options import FinetuneOptions
from peft_fps.vision.pixels import Collator, ImageSplit
from peft_fps.vision.prediction import Predictor, accuracy
from peft_fps.vision.preparation import training_callback
from peft_fps.vision.training_loop import DivergedError, train, training_arguments


@dataclass(frozen=True)
class RateTrial:
    """A short training at one learning rate.

    Attributes:
        rate: the learning rate.
        accuracy: on the validation images afterwards; None if training diverged.
    """

    rate: float
    accuracy: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return the trial as plain data."""
        return asdict(self)


def best_rate(trials: Sequence[RateTrial]) -> float:
    """Return the rate of the trial with the best accuracy, the smallest of equals.

    Raises:
        ValueError: training diverged in all trials.
    """
    judged = [(trial.accuracy, -trial.rate) for trial in trials if trial.accuracy is not None]
    if not judged:
        rates = ", ".join(f"{trial.rate:g}" for trial in trials)
        raise ValueError(
            f"--learning-rate auto: training diverged at each of {rates}, expected one that does not. Give a smaller "
            "--learning-rate, and look at the images."
        )
    return -max(judged)[1]


def trial_steps(images: int, batch_size: int, epochs: int) -> int:
    """Return the number of steps of a trial: those of one epoch, between the bounds, at most those of the training."""
    epoch = math.ceil(images / batch_size)
    return min(max(epoch, LEAST_STEPS), MOST_STEPS, epoch * epochs)


def told(trials: Sequence[RateTrial]) -> str:
    """Return in words which rate was taken and why."""
    lines = [
        f"learning rate {trial.rate:g}: "
        + ("diverged" if trial.accuracy is None else f"validation accuracy {trial.accuracy:.2%}")
        for trial in trials
    ]
    return "\n".join([*lines, f"taken: {best_rate(trials):g}, the best, and the smallest of equals"])


def run_trials(
    options: FinetuneOptions,
    recipe: Mapping[str, Any],
    model: nn.Module,
    splits: Mapping[str, ImageSplit],
    collator: Collator,
    predictor: Predictor,
) -> list[RateTrial]:
    """Try the rates on a calibrated adapter, whose state is put back.

    The same seed gives the same trials. Each has the whole schedule, warm-up and decay included, in its few steps.

    Args:
        options: give seed, precision, the rates of biases and head, and whether inputs are centred.
        recipe: training arguments, of which the learning rate is replaced.
        model: with the adapter.
        splits: `train` and `validation`.
        collator: makes batches.
        predictor: predicts the validation images.
    """
    images, size = len(splits["train"]), recipe["per_device_train_batch_size"]
    steps = trial_steps(images, size, recipe["num_train_epochs"])

    def run(rate: float) -> None:
        short = {**recipe, "learning_rate": rate, "max_steps": steps}
        arguments = training_arguments(
            short, images, predictor.workers, options.output, options.seed, options.precision
        )
        arguments.logging_strategy = IntervalStrategy.NO
        train(model, arguments, splits["train"], collator, callbacks=[training_callback(options, model, rate)])

    def judge() -> float:
        logits = predictor.logits(model, splits["validation"], "Predicting validation")
        return accuracy(logits, splits["validation"].labels)

    return try_rates(model, run, judge, TRIED_RATES)


def try_rates(
    model: nn.Module, train: Callable[[float], Any], judge: Callable[[], float], rates: Sequence[float]
) -> list[RateTrial]:
    """Train at each rate from the same state, judge the result, and put the state back.

    Parameters, buffers, training mode and torch's random state are as before afterwards, whatever happens.

    Args:
        model: what is trained.
        train: trains the model in place at a rate.
        judge: returns the accuracy of the model as it is now.
        rates: to try, in this order.
    """
    trials = []
    for rate in rates:
        with state_kept(model):
            try:
                train(rate)
                accuracy: float | None = judge()
            except DivergedError:
                accuracy = None
            trials.append(RateTrial(rate, accuracy))
    return trials


@contextmanager
def state_kept(model: nn.Module) -> Iterator[None]:
    """Put back what training changes in a model, bit for bit, and torch's random state."""
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    names |= {name for name, _ in model.named_buffers()}
    before = {name: tensor.detach().clone() for name, tensor in _tensors(model).items() if name in names}
    mode, random = model.training, torch.random.get_rng_state()
    try:
        yield
    finally:
        after = _tensors(model)  # a move to another device makes new buffers
        with torch.no_grad():
            for name, tensor in before.items():
                after[name].copy_(tensor)
        model.zero_grad()
        model.train(mode)
        torch.random.set_rng_state(random)


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return all parameters and buffers by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
