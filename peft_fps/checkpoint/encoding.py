"""How one module's part of an adapter is written to safetensors, and read again.

| tensor | shape | dtype on disk |
|---|---|---|
| `fps_values` | `(nnz,)` | as trained, float32 by default |
| `fps_columns` | `(nnz,)` | uint16 where the fan-in is at most 65,536, else int32 |
| `fps_row_counts` | `(neurons,)` | the smallest unsigned type that holds the largest count |
| `fps_bias` | `(neurons,)` | like values; unless `bias="none"`; negative zeros where the bias is left out |
| `fps_threshold` | `(1,)` | float32; only with `token_gate` |

A neuron is an output of a linear layer, or an output channel of a convolution. Columns count its inputs from 0, as the
weight `W` lists them:

| layer | weight | entry at neuron n, column c |
|---|---|---|
| `nn.Linear` | `(neurons, inputs)` | `W[n, c]` |
| transformers' `Conv1D` | `(inputs, neurons)` | `W[c, n]` |
| `nn.Conv1d` to `nn.Conv3d` | `(neurons, channels / groups, *kernel)` | `W[n].flatten()[c]` |
| `nn.ConvTranspose1d` to `3d` | `(channels, neurons / groups, *kernel)` | `W[i, o].flatten()[c % taps]` |

In the last row, taps is the number of positions in the kernel. `o = n % (neurons / groups)` is the place of the neuron
in its group. `i = n // (neurons / groups) · (channels / groups) + c // taps` is an input channel of that group. So the
columns of a transposed convolution are those of a convolution with the same channels and kernel.

Negative zero changes no number that it is added to, not even the sign of a zero. So versions that know of no bias that
is left out load such a file, and compute the same.

A norm, which has a bias delta alone, is written as a module with 0 inputs and 0 entries.
"""

import torch
from torch import Tensor


PREFIX = "fps_"
"""Begins the name of every sparse tensor."""

TENSORS = ("fps_values", "fps_columns", "fps_row_counts", "fps_bias", "fps_threshold")

TRAINED = ("fps_values", "fps_bias", "fps_threshold")
"""Those of `TENSORS` that are parameters."""

PEFT_PREFIX = "base_model.model."
"""What PEFT puts before the path of a module in its keys."""


def column_dtype(inputs: int) -> torch.dtype:
    """Return the dtype of columns on disk for a fan-in of `inputs`."""
    return torch.uint16 if inputs <= 1 << 16 else torch.int32


def count_dtype(largest: int) -> torch.dtype:
    """Return the dtype of row counts on disk where `largest` is the largest of them."""
    return torch.uint8 if largest < 1 << 8 else torch.uint16 if largest < 1 << 16 else torch.uint32


def encode(name: str, tensor: Tensor, inputs: int) -> Tensor:
    """Return a tensor as it is written to disk.

    Args:
        name: one of `TENSORS`.
        tensor: as it is held in memory.
        inputs: fan-in of the module.
    """
    if name == "fps_columns":
        return tensor.to(column_dtype(inputs))
    if name == "fps_row_counts":
        return tensor.to(count_dtype(int(tensor.max()) if tensor.numel() else 0))
    return tensor


def decode(name: str, tensor: Tensor) -> Tensor:
    """Return a checked tensor from disk as it is held in memory: indices as int32, others unchanged.

    Args:
        name: one of `TENSORS`.
        tensor: as it is on disk.
    """
    return tensor.to(torch.int32) if name in ("fps_columns", "fps_row_counts") else tensor


def no_entries(bias: Tensor) -> dict[str, Tensor]:
    """Return what a file holds of a norm besides its bias delta `(neurons,)`, as tensors in memory by their names."""
    counts = torch.zeros(bias.numel(), dtype=torch.int32, device=bias.device)
    return {"fps_values": bias.detach().new_zeros(0), "fps_columns": counts[:0], "fps_row_counts": counts}


def left_out_bias(values: Tensor, neurons: int) -> Tensor:
    """Return the `fps_bias` `(neurons,)` of a file that says that there is none, in the dtype of the values."""
    return values.new_full((neurons,), -0.0)


def is_left_out(bias: Tensor) -> bool:
    """Return whether an `fps_bias` of a file says that the adapter leaves it out."""
    if bias.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16) or not bias.numel():
        return False
    return bool(((bias == 0) & bias.signbit()).all())


def encoded_bytes(row_counts: Tensor, inputs: int, value_size: int, biases: int) -> int:
    """Return the number of bytes that one module's tensors take on disk, without the threshold of a gate.

    Args:
        row_counts: `(neurons,)` entries per neuron.
        inputs: fan-in.
        value_size: bytes of one value or bias delta.
        biases: number of bias deltas, 0 or the number of neurons.
    """
    entries, largest = int(row_counts.sum()), int(row_counts.max()) if row_counts.numel() else 0
    per_entry = value_size + column_dtype(inputs).itemsize
    return entries * per_entry + row_counts.numel() * count_dtype(largest).itemsize + biases * value_size
