"""Whether a callback centres steps of its own accord."""

from typing import Any

import torch
from torch import nn
from torch.utils.data import IterableDataset

from peft_fps.training.centred_steps import steps_of
from peft_fps.training.centring import centrable, stepped_optimizer, told


STEPPING_BY_GRADIENTS = ("torch.optim.", "bitsandbytes.optim.", "transformers.optimization.")
"""Modules of optimizers whose steps depend on gradients alone, weight decay aside."""


def reason_against(model: nn.Module, optimizer: Any, adapter_name: str, loader: Any) -> str:
    """Return why steps are not centred unless this is asked for; nothing if they are.

    Args:
        model: model with the adapter.
        optimizer: the trainer's.
        adapter_name: name of the adapter.
        loader: of the training data, which the means are taken over before training reads it.
    """
    try:
        stepped: torch.optim.Optimizer = stepped_optimizer(optimizer)
    except TypeError as error:
        return str(error)
    if not f"{type(stepped).__module__}.".startswith(STEPPING_BY_GRADIENTS):
        return f"{type(stepped).__name__} may keep copies or averages of parameters, which would lack the shift"
    if steps_of(stepped):
        return "the optimizer's steps are centred already"
    if _is_read_once(loader):
        return "the training data is a stream, which may not be the same when it is read again"
    layers, left_out = centrable(model, stepped, adapter_name)
    return "" if layers else told(left_out)


def _is_read_once(loader: Any) -> bool:
    """Whether the data of a loader is a stream of one's own; those of `datasets` start anew."""
    data = getattr(loader, "dataset", None)
    data = getattr(data, "dataset", data)  # a process's share of a stream
    kinds = {kind.__module__.partition(".")[0] for kind in type(data).__mro__}
    return isinstance(data, IterableDataset) and "datasets" not in kinds
