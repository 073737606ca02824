"""From whatever holds calibration data to batches, and from a batch to a call of the model."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from accelerate.utils import send_to_device
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
    """Run the model on one batch, moved to `device`, and return the number of examples in it; see `run_model`."""
    inputs = send_to_device(inputs_of(batch), device)
    run_model(model, inputs)
    return count_examples(inputs)


def run_model(model: nn.Module, batch: Any) -> Any:
    """Return the model's outputs for a batch on its device.

    A mapping is passed by name (names that the model's forward does not take are left out), of a tuple or list the
    first element (the rest being labels), a tensor as it is.
    """
    inputs = inputs_of(batch)
    return model(inputs) if isinstance(inputs, Tensor) else model(**_accepted(model, inputs))


def inputs_of(batch: Any) -> Tensor | Mapping[str, Any]:
    """Return what of a batch goes to the model.

    Raises:
        TypeError: it is neither a tensor nor a mapping.
    """
    inputs = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(inputs, (Mapping, Tensor)):
        raise TypeError(
            f"a calibration batch is of type {type(batch).__name__}, expected a mapping of tensors, a tensor, or a "
            "tuple that begins with one of these."
        )
    return inputs


def count_examples(batch: Any) -> int:
    """Return the number of examples in a batch: the first dimension of the first tensor that has one.

    Without such a tensor, the length of the first list.
    """
    inputs = inputs_of(batch)
    if isinstance(inputs, Tensor):
        return inputs.shape[0] if inputs.dim() else 1
    sizes = [value.shape[0] for value in inputs.values() if isinstance(value, Tensor) and value.dim()]
    sizes += [count_examples(value) for value in inputs.values() if isinstance(value, Mapping)]
    sizes += [len(value) for value in inputs.values() if isinstance(value, (tuple, list))]
    return sizes[0] if sizes else 1


def single_examples(batch: Any) -> Iterator[Any]:
    """Yield batches of one example each.

    Tensors whose first dimension is the batch's are sliced, and so are lists and tuples of one item per example (of
    texts, or of annotations). A list or tuple of tensors that hold the whole batch each is kept as it is built.
    """
    size = count_examples(batch)

    def whole(part: Any) -> bool:
        return isinstance(part, Tensor) and part.dim() > 0 and part.shape[0] == size

    def sliced(part: Any, index: int, top: bool = False) -> Any:
        if isinstance(part, Tensor):
            return part[index : index + 1] if whole(part) else part
        if isinstance(part, Mapping):
            return {name: sliced(value, index) for name, value in part.items()}
        if isinstance(part, (tuple, list)):
            if len(part) == size and not top and not all(map(whole, part)):
                return part[index : index + 1]
            return [sliced(value, index) for value in part]
        return part

    for index in range(size):
        yield sliced(batch, index, top=True)


def _accepted(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(model.forward).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return dict(inputs)
    return {name: value for name, value in inputs.items() if name in parameters}
