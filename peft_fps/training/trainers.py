"""Runs of a model on a batch with the preparation and the loss of its trainer."""

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

from peft_fps.base.sharded import has_shards
from peft_fps.calibration import fits, run_model
from peft_fps.layers.lookup import base_model


if TYPE_CHECKING:
    from transformers import Trainer  # imports datasets, which takes seconds


def calling_trainer(callback: TrainerCallback) -> "Trainer | None":
    """Return the trainer that is calling a callback, or None if something else calls it.

    Trainers do not pass themselves to callbacks, so the function searches the frames of the callers.
    """
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        handler = vars(caller).get("callback_handler") if hasattr(caller, "__dict__") else None
        if isinstance(handler, CallbackHandler) and callback in handler.callbacks:
            return caller
        frame = frame.f_back
    return None


class AsTrained:
    """Batches of a trainer, and the trainer's way to run a model on them. Iterating prepares the batches.

    Args:
        trainer: trainer of transformers, or of a library that builds on it.
        model: model of the trainer.
        data: batches of the trainer.
        plainly: run the model itself on batches that hold what its forward takes. This suffices if no loss is needed.

    Attributes:
        loader: the trainer's batches as they are.
    """

    def __init__(self, trainer: "Trainer", model: nn.Module, data: Any, plainly: bool) -> None:
        self._trainer = trainer
        self._model = model
        self.loader = data
        self._plainly = plainly

    def __iter__(self) -> Iterator[Any]:
        base = base_model(self._model)
        for batch in self.loader:
            yield batch if self._plainly and fits(base, batch) else self._trainer._prepare_inputs(batch)

    def __len__(self) -> int:
        return len(self.loader)

    def run(self, base: nn.Module, batch: Any) -> Any:
        """Return the outputs of the base model, or the trainer's loss as `{"loss": ...}`.

        Args:
            base: base model.
            batch: a batch that iterating has yielded.
        """
        if self._plainly and fits(base, batch):
            return run_model(base, batch)
        if has_shards(base):
            raise ValueError(
                f"the model is sharded, and the forward of its {type(base).__name__} takes nothing of the trainer's "
                "batches, expected batches of the model's inputs, since the trainer's loss needs all parameters at "
                "once. Give FPSCallback(run=...), or call model.calibrate before the Trainer "
                "is made. Nothing was changed."
            )
        with self._trainer.compute_loss_context_manager():
            return {"loss": self._trainer.compute_loss(self._model, batch)}


@contextmanager
def undisturbed_trainer(trainer: "Trainer", model: nn.Module) -> Iterator[None]:
    """Let a trainer compute losses of the base model within the block, and restore its state afterwards.

    Within the block the trainer's counters and logs are copies. The model is marked as evaluating, so that the trainer
    keeps nothing for a next step. Switching adapters has no effect. Trainers switch them for the outputs of a
    reference model, which is the base model here.

    Args:
        trainer: trainer of transformers, or of a library that builds on it.
        model: model of the trainer, whose adapters are switched off.
    """
    wrappers = [module for module in model.modules() if isinstance(module, PeftModel)]
    before, state = dict(vars(trainer)), dict(vars(trainer.state))
    modes = model.training
    try:
        for name, value in before.items():
            if "dataset" not in name:  # a dataset may be a long list, and nothing writes to it
                vars(trainer)[name] = _copied(value)
        vars(trainer).setdefault("current_gradient_accumulation_steps", 1)
        if "num_generations_eval" in before:  # the batches come from training, although the model evaluates
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
    """Restore the generators of a loader and its samplers after the block, so that the order of batches is the same.

    Args:
        data: loader of the batches that the block reads.
    """
    states = [(generator, generator.get_state()) for generator in _generators(data)]
    loader = _innermost(data)
    collator = _collator(loader)
    makes_generator = getattr(collator, "generator", loader) is None  # of a seed, with the first batch
    keeps_workers = getattr(loader, "_iterator", loader) is None
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)
        if makes_generator:
            collator.generator = None
        if keeps_workers and loader._iterator is not None:  # persistent ones, whose generators have gone on
            loader._iterator._shutdown_workers()
            loader._iterator = None


def _innermost(loader: Any) -> Any:
    """Return the loader that others are wrapped around."""
    inner = getattr(loader, "base_dataloader", None)
    return loader if inner is None else _innermost(inner)


def _collator(loader: Any) -> Any:
    """Return what makes a loader's batches, without what the Trainer wraps around it."""
    collator = getattr(loader, "collate_fn", None)
    return getattr(collator, "data_collator", collator)


def _generators(loader: Any) -> list[torch.Generator]:
    """Return the generators of a loader or sampler, and of the samplers and loaders within it."""
    direct = [getattr(loader, name, None) for name in ("generator", "synchronized_generator")]
    direct.append(getattr(_collator(loader), "generator", None))
    parts = [getattr(loader, name, None) for name in ("sampler", "batch_sampler", "base_dataloader")]
    nested = [generator for part in parts if part is not None for generator in _generators(part)]
    return [generator for generator in direct if isinstance(generator, torch.Generator)] + nested


def _copied(value: Any) -> Any:
    """Return a deep copy of dicts, lists, deques and tensors, and any other value itself."""
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
    """Take any arguments and do nothing, in place of `set_adapter`."""
    return None
