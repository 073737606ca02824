"""Run a model on a batch as its trainer does: with the trainer's own preparation and loss."""

import inspect
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import copy
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.trainer_callback import CallbackHandler, TrainerCallback

from peft_fps.calibration import fits, run_model
from peft_fps.layers.lookup import base_model


if TYPE_CHECKING:
    from transformers import Trainer  # brings the whole of datasets, which takes seconds to import


def calling_trainer(callback: TrainerCallback) -> "Trainer | None":
    """Return the trainer that is calling a callback, which it does not tell; None if something else calls it."""
    frame = inspect.currentframe()
    while frame is not None:
        found = frame.f_locals.get("self")
        handler = vars(found).get("callback_handler") if hasattr(found, "__dict__") else None
        if isinstance(handler, CallbackHandler) and callback in handler.callbacks:
            return found
        frame = frame.f_back
    return None


class AsTrained:
    """Batches of a trainer, and how it runs a model on them. Iterating prepares them as the trainer does.

    Args:
        trainer: of transformers, or of a library that builds on it.
        model: the trainer's.
        data: its batches.
        plainly: run the model itself on batches that hold what its forward takes, which is enough where no loss is
            needed.
    """

    def __init__(self, trainer: "Trainer", model: nn.Module, data: Any, plainly: bool) -> None:
        self._trainer = trainer
        self._model = model
        self._data = data
        self._plainly = plainly

    def __iter__(self) -> Iterator[Any]:
        base = base_model(self._model)
        for batch in self._data:
            yield batch if self._plainly and fits(base, batch) else self._trainer._prepare_inputs(batch)

    def __len__(self) -> int:
        return len(self._data)

    def run(self, base: nn.Module, batch: Any) -> Any:
        """Return outputs of the base model, or the trainer's loss."""
        if self._plainly and fits(base, batch):
            return run_model(base, batch)
        with self._trainer.compute_loss_context_manager():
            return {"loss": self._trainer.compute_loss(self._model, batch)}


@contextmanager
def undisturbed_trainer(trainer: "Trainer", model: nn.Module) -> Iterator[None]:
    """Let a trainer compute losses of the base model, and be as it was afterwards.

    What it counts and logs it writes to copies. It is told that it evaluates, so that nothing is kept for a next step.
    Adapters cannot be switched, which trainers do for the outputs of a reference model: it is the base model here.
    """
    wrappers = [module for module in model.modules() if isinstance(module, PeftModel)]
    before, state = dict(vars(trainer)), dict(vars(trainer.state))
    modes = model.training
    try:
        for name, value in before.items():
            if "dataset" not in name:  # may be a long list
                vars(trainer)[name] = _copied(value)
        vars(trainer).setdefault("current_gradient_accumulation_steps", 1)
        if "num_generations_eval" in before:  # batches are those of training
            vars(trainer)["num_generations_eval"] = before["num_generations"]
        for wrapper in wrappers:
            vars(wrapper)["set_adapter"] = _nothing
            vars(wrapper)["disable_adapter"] = nullcontext
        model.training = False
        yield
    finally:
        model.training = modes
        for wrapper in wrappers:
            del vars(wrapper)["set_adapter"], vars(wrapper)["disable_adapter"]
        vars(trainer.state).update(state)
        vars(trainer).clear()
        vars(trainer).update(before)


@contextmanager
def undisturbed_order(data: Any) -> Iterator[None]:
    """Let batches come once more as they would have come: samplers may draw from generators of their own."""
    found = [(generator, generator.get_state()) for generator in _generators(data)]
    try:
        yield
    finally:
        for generator, state in found:
            generator.set_state(state)


def _generators(loader: Any) -> list[torch.Generator]:
    held = [getattr(loader, name, None) for name in ("generator", "synchronized_generator")]
    parts = [getattr(loader, name, None) for name in ("sampler", "batch_sampler", "base_dataloader")]
    found = [generator for part in parts if part is not None for generator in _generators(part)]
    return [generator for generator in held if isinstance(generator, torch.Generator)] + found


def _copied(value: Any) -> Any:
    """A copy of containers within containers, and of tensors in them."""
    if type(value) in (dict, defaultdict):
        result = copy(value)
        result.update({key: _copied(item) for key, item in value.items()})
        return result
    if type(value) in (list, deque):
        result = copy(value)
        result.clear()
        result.extend(map(_copied, value))
        return result
    return value.clone() if isinstance(value, Tensor) else value


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None
