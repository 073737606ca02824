"""What is checked about an adapter's tensors before the first of them reaches the model.

A file that is loaded or hot-swapped passes these checks, in this order:

| check | of | where |
|---|---|---|
| safetensors and no pickle, readable, with all tensors saved whole, digest as in the config | file | `folder` |
| types and ranges of all fields, format version | config | `FPSConfig` |
| modules, their sizes, the base model's fingerprint | config and model | `plan`, `fingerprint` |
| modules that are trained whole | config and model | `whole_modules`, `whole_checks` |
| every tensor once | file | `contents` |
| modules and their tensors, dtypes, shapes, ranges, order, finite values, numbers of entries | file and model | here |
| tensors saved whole: names, dtypes, shapes, finite values | file and model | here |

Where PEFT loads into an adapter that is there already, it reads no config, and only the last three are made.

Sizes come from the model and the config, never from the file. Indices are checked on the device to which they were
read. Nothing is built from a tensor before it has passed.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_fps.checkpoint.contents import Contents
from peft_fps.checkpoint.safetensors_file import FILE_REMEDY
from peft_fps.sparse import StructureError, check_entries, check_finite, check_floating


@dataclass(frozen=True)
class Expected:
    """What config and model say about one module's part of the file.

    Attributes:
        neurons: number of output neurons.
        inputs: fan-in.
        entries: number of selected entries.
        bias: whether there is a bias delta.
        gate: whether there is the threshold of a gate.
    """

    neurons: int
    inputs: int
    entries: int
    bias: bool
    gate: bool = False


def check_contents(
    contents: Contents,
    modules: Mapping[str, Expected],
    wholes: Mapping[str, Tensor],
    *,
    total_only: bool = False,
) -> None:
    """Check all tensors of an adapter file.

    Args:
        contents: of the file.
        modules: what is expected of each module's sparse tensors, by module path.
        wholes: the tensors that those saved whole will replace, by their names in the base model.
        total_only: let the number of entries per module be free, as long as their sum is as expected.

    Raises:
        ValueError: names module and tensor, what was found, what was expected and what to do.
    """
    check_adapter_tensors(contents.modules, modules, total_only)
    check_whole_modules(contents.wholes, wholes)


def check_adapter_tensors(
    modules: Mapping[str, Mapping[str, Tensor]], expected: Mapping[str, Expected], total_only: bool = False
) -> None:
    """Check the sparse tensors of an adapter file.

    Args:
        modules: module path to tensor name (`fps_values`, ...) to tensor, as read from the file.
        expected: the same modules as config and model describe them.
        total_only: let the number of entries per module be free, as long as their sum is as expected.

    Raises:
        ValueError: names module and tensor, what was found, what was expected and what to do; the first problem in
            the order of `expected`.
    """
    for name in modules:
        if name not in expected:
            raise ValueError(
                f"{name}: the adapter file holds {sorted(modules[name])}, expected tensors of the modules that this "
                f"adapter targets alone. {FILE_REMEDY}"
            )
    found = 0
    for name, wanted in expected.items():
        tensors = modules.get(name, {})
        names = {"fps_values", "fps_columns", "fps_row_counts"}
        names |= ({"fps_bias"} if wanted.bias else set()) | ({"fps_threshold"} if wanted.gate else set())
        if set(tensors) != names:
            raise ValueError(
                f"{name}: the adapter file holds {sorted(tensors) or 'nothing'}, expected {sorted(names)}. "
                f"{FILE_REMEDY}"
            )
        try:
            _check_module(tensors, wanted, total_only)
        except StructureError as error:
            raise ValueError(f"{name}: {error}. {FILE_REMEDY}") from error
        found += tensors["fps_columns"].numel()
    if found != sum(wanted.entries for wanted in expected.values()):
        raise ValueError(
            f"The adapter file holds {found:,} entries, expected {sum(w.entries for w in expected.values()):,} in "
            f"{len(expected)} modules as the config says. {FILE_REMEDY}"
        )


def _check_module(tensors: Mapping[str, Tensor], wanted: Expected, total_only: bool) -> None:
    """Raise StructureError unless a module's tensors have the right dtypes, shapes, indices and number of entries."""
    columns, row_counts, values = (tensors[name] for name in ("fps_columns", "fps_row_counts", "fps_values"))
    for name, tensor, allowed in (
        ("fps_columns", columns, (torch.uint16, torch.int32)),
        ("fps_row_counts", row_counts, (torch.uint8, torch.uint16, torch.uint32, torch.int32)),
    ):
        if tensor.dtype not in allowed:
            raise StructureError(f"{name} has dtype {tensor.dtype}, expected one of {', '.join(map(str, allowed))}")
    check_entries(columns, row_counts, wanted.neurons, wanted.inputs, values)
    if not total_only and columns.numel() != wanted.entries:
        raise StructureError(
            f"fps_columns has {columns.numel()} elements, expected {wanted.entries} as the config says"
        )
    if wanted.bias:
        _check_trained("fps_bias", tensors["fps_bias"], torch.Size([wanted.neurons]))
    if wanted.gate:
        _check_trained("fps_threshold", tensors["fps_threshold"], torch.Size([1]))


def check_whole_modules(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Check the tensors of modules that are saved whole against the model's own.

    Args:
        tensors: all tensors of the file that are not sparse, by their names in the base model.
        expected: the tensors that they will replace, by the same names.

    Raises:
        ValueError: names the tensor, what was found, what was expected and what to do.
    """
    for key, tensor in tensors.items():
        if key not in expected:
            raise ValueError(
                f"{key}: the adapter file holds this tensor, expected only sparse tensors of targeted modules and the "
                f"modules named in modules_to_save; base weights are never loaded from an adapter. {FILE_REMEDY}"
            )
        found, wanted = tuple(tensor.shape), tuple(expected[key].shape)
        if found[:1] != wanted[:1] and found[1:] == wanted[1:] and len(found) == len(wanted):
            raise ValueError(
                f"{key}: the adapter's head has {found[0]} outputs (shape {found}), expected {wanted[0]} as "
                f"the model's (shape {wanted}). Load the base model with as many classes as the adapter was trained "
                f"for (num_labels, num_classes, ...). {FILE_REMEDY} Nothing was loaded."
            )
        try:
            if expected[key].is_floating_point():
                _check_trained("tensor", tensor, expected[key].shape)
            elif tensor.dtype != expected[key].dtype or tensor.shape != expected[key].shape:  # counters of norm layers
                raise StructureError(
                    f"tensor has dtype {tensor.dtype} and shape {tuple(tensor.shape)}, expected {expected[key].dtype} "
                    f"and {tuple(expected[key].shape)}"
                )
        except StructureError as error:
            raise ValueError(f"{key}: {error}. {FILE_REMEDY}") from error
    for key in expected:
        if key not in tensors:
            raise ValueError(f"{key}: not in the adapter file, expected since modules_to_save names it. {FILE_REMEDY}")


def _check_trained(name: str, tensor: Tensor, shape: torch.Size) -> None:
    """Raise StructureError unless a trained tensor has a floating dtype, this shape and finite values."""
    check_floating(name, tensor, shape)
    check_finite(name, tensor)
