"""Batches of calibration data: from loaders, datasets and sequences, and what they consist of."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import default_data_collator


def batches(data: Any, collator: Callable[..., Any] | None, batch_size: int) -> Iterable[Any]:
    """Return an iterable of batches.

    Args:
        data: a `DataLoader` or another iterable of batches. Or examples, which are read in order: a
            `datasets.Dataset`, a torch `Dataset`, or, with a collator, any sequence.
        collator: makes a batch of a list of examples. Default for datasets: transformers' `default_data_collator`.
        batch_size: number of examples per batch. It does not apply to data that consists of batches.

    Raises:
        TypeError: the data is a single batch, or is not iterable.
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
    """Whether the data is a torch `Dataset` or comes from the package `datasets`."""
    # by the name of the package, because datasets.Dataset is no torch Dataset and datasets may not be installed
    return isinstance(data, Dataset) or type(data).__module__.partition(".")[0] == "datasets"


def inputs_of(batch: Any) -> Tensor | Mapping[str, Any] | list[Mapping[str, Any]]:
    """Return the part of a batch that goes to the model.

    Args:
        batch: a mapping or a tensor, which is returned as it is. Or a tuple or list, of which the first element is
            returned, because the rest are labels. Several mappings with the same names, such as sentence pairs, are
            inputs of one call each. They may be the batch or the first element of the tuple.

    Raises:
        TypeError: the batch is of another kind.
    """
    if _are_columns(batch):
        return list(batch)
    inputs = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if inputs is not batch and _are_columns(inputs):
        return list(inputs)
    if not isinstance(inputs, (Mapping, Tensor)):
        raise TypeError(
            f"a calibration batch is of type {type(batch).__name__}, expected a mapping of tensors, a tensor, or a "
            "tuple that begins with one of these. For batches of another kind, pass run=callable to calibrate."
        )
    return inputs


def mask_beside(batch: Any) -> Tensor | None:
    """Return the mask of padding in a batch `(tokens, mask, ...)` of tensors, or None if the second is none.

    It is one if it holds ones and zeros, one for each token, and the zeros are where one token is that is nowhere
    else: the padding token. Labels of tokens are not so.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        return None
    tokens, mask = batch[:2]
    if not (isinstance(tokens, Tensor) and isinstance(mask, Tensor)) or tokens.is_floating_point():
        return None
    if mask.shape != tokens.shape or mask.dim() != 2 or not bool(((mask == 0) | (mask == 1)).all()):
        return None
    padding = tokens[mask == 0].unique()
    return mask if padding.numel() == 1 and not bool((tokens[mask == 1] == padding).any()) else None


def _are_columns(parts: Any) -> bool:
    """Whether a tuple or list consists of several mappings with the same names."""
    several = isinstance(parts, (tuple, list)) and len(parts) > 1
    return several and all(isinstance(part, Mapping) and part.keys() == parts[0].keys() for part in parts)


def count_examples(batch: Any) -> int:
    """Return the number of examples in a batch.

    It is the first dimension of the first input tensor that has one. Without such a tensor, it is the length of the
    first list. For a list that holds neither mappings nor tensors, it is the length of that list.
    """
    try:
        inputs = inputs_of(batch)
    except TypeError:  # a batch that only a `run` of the user understands
        return len(batch) if isinstance(batch, (tuple, list)) else 1
    if isinstance(inputs, list):
        tensors = any(isinstance(value, Tensor) for value in inputs[0].values())
        return count_examples(inputs[0]) if tensors else len(inputs)
    if isinstance(inputs, Tensor):
        return inputs.shape[0] if inputs.dim() else 1
    sizes = [value.shape[0] for value in inputs.values() if isinstance(value, Tensor) and value.dim()]
    sizes += [count_examples(value) for value in inputs.values() if isinstance(value, Mapping)]
    sizes += [len(value) for value in inputs.values() if isinstance(value, (tuple, list))]
    return sizes[0] if sizes else 1


def single_examples(batch: Any) -> Iterator[Any]:
    """Split a batch into batches of one example each.

    Tensors whose first dimension is the number of examples are sliced, and so are lists and tuples with one item per
    example, such as texts or annotations. A list or tuple of tensors over all examples keeps its structure.

    Args:
        batch: as `inputs_of` takes it, or of any other kind with tensors, mappings, lists and tuples in it.

    Yields:
        A batch of the same structure with one example.
    """
    size = count_examples(batch)
    paired = isinstance(batch, (tuple, list)) and bool(batch) and _are_columns(batch[0])

    def covers_batch(part: Any) -> bool:
        return isinstance(part, Tensor) and part.dim() > 0 and part.shape[0] == size

    def sliced(part: Any, index: int, top: bool = False) -> Any:
        if isinstance(part, Tensor):
            return part[index : index + 1] if covers_batch(part) else part
        if isinstance(part, Mapping):
            return {name: sliced(value, index) for name, value in part.items()}
        if isinstance(part, (tuple, list)):
            if len(part) == size and not top and not all(map(covers_batch, part)):
                return part[index : index + 1]
            return [sliced(value, index, top and paired and value is part[0]) for value in part]
        return part

    for index in range(size):
        yield sliced(batch, index, top=True)
