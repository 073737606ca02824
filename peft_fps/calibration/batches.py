"""From whatever holds calibration data to batches, and from a batch to a call of the model."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from accelerate.utils import find_batch_size, send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import default_data_collator


def batches(data: Any, collator: Callable[..., Any] | None, batch_size: int) -> Iterable[Any]:
    """Return an iterable of batches.

    Args:
        data: a `DataLoader` or any iterable of batches; or examples, read in order: a `datasets.Dataset`, a torch
            `Dataset`, or with a collator any sequence.
        collator: makes a batch of a list of examples; transformers' default for datasets if None.
        batch_size: examples per batch, for examples.

    Raises:
        TypeError: the data is a single batch, or cannot be iterated.
    """
    if isinstance(data, (Mapping, Tensor, str, bytes)):
        raise TypeError(
            f"calibration data is a single {type(data).__name__}, expected a DataLoader, a dataset, or an iterable of "
            "batches. Put a single batch into a list."
        )
    if _is_dataset(data) or (collator is not None and not isinstance(data, DataLoader)):
        return DataLoader(data, batch_size=batch_size, collate_fn=collator or default_data_collator)
    if not isinstance(data, Iterable):
        raise TypeError(
            f"calibration data is of type {type(data).__name__}, expected a DataLoader, a dataset, or an iterable of "
            "batches."
        )
    return data


def _is_dataset(data: Any) -> bool:
    # datasets.Dataset is no torch Dataset, and datasets need not be installed
    return isinstance(data, Dataset) or type(data).__module__.partition(".")[0] == "datasets"


def feed(model: nn.Module, batch: Any, device: torch.device) -> int:
    """Run the model on one batch, moved to `device`, and return the number of examples in it.

    A mapping is passed by name (names that the model's forward does not take are left out), of a tuple or list the
    first element (the rest being labels), a tensor as it is.
    """
    inputs = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(inputs, (Mapping, Tensor)):
        raise TypeError(
            f"a calibration batch is of type {type(batch).__name__}, expected a mapping of tensors, a tensor, or a "
            "tuple that begins with one of these."
        )
    inputs = send_to_device(inputs, device)
    if isinstance(inputs, Tensor):
        model(inputs)
        return inputs.shape[0] if inputs.dim() else 1
    model(**_accepted(model, inputs))
    return find_batch_size(inputs) or 0


def _accepted(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(model.forward).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return dict(inputs)
    return {name: value for name, value in inputs.items() if name in parameters}
