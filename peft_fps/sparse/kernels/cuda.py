"""The Triton kernel for CUDA: one program per block of neurons and run of tokens, without a dense or transposed copy.

The first use imports Triton and tries the kernel on a tiny product. If that fails, PyTorch alone computes products.
"""

from __future__ import annotations  # the kernel's annotations name a module that is imported later

import logging
from functools import cache
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peft_fps.sparse.kernels.switches import is_switched_on
from peft_fps.sparse.structure import PRODUCT_ELEMENTS, Structure, build_structure


if TYPE_CHECKING:
    import triton.language as tl

logger = logging.getLogger(__name__)

SWITCH = "PEFT_FPS_TRITON"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK_TOKENS, BLOCK_NEURONS = 32, 64  # powers of two: Triton requires it
PROGRAMS = 512
"""Programs to reach. With fewer blocks of neurons, several programs share the tokens of a block."""
TOKENS_PER_PROGRAM = 256
"""Up to this many tokens stay in one program, because every further share costs partial sums to add up."""


def fits(grad_output: Tensor, inputs: Tensor, structure: Structure) -> bool:
    """Whether the kernel takes these operands, is switched on, and works; arguments as `sampled_product`."""
    return (
        grad_output.device.type == "cuda"
        and inputs.device == grad_output.device
        and grad_output.dtype in DTYPES
        and inputs.dtype == grad_output.dtype
        and is_switched_on(SWITCH)
        and works(grad_output.device, grad_output.dtype)
    )


_tried: dict[tuple[torch.device, torch.dtype], bool] = {}
_trying = Lock()  # autograd has one thread per device


def works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel works, found out by one tiny product per device and dtype.

    After the first failure the process tries no further device or dtype, and the answer is False for all. The log says
    why, at level DEBUG.
    """
    with _trying:
        if all(_tried.values()) and (device, dtype) not in _tried:
            try:
                _try(device, dtype)
                _tried[device, dtype] = True
            except Exception as error:  # an import, a compiler, a driver: their errors have nothing else in common
                _tried[device, dtype] = False
                logger.debug("no Triton kernel, gradients of sparse values are computed by PyTorch alone: %r", error)
        return all(_tried.values())


def _try(device: torch.device, dtype: torch.dtype) -> None:
    """Compute a product of ones, whose every number must be the number of tokens.

    Raises:
        ArithmeticError: the numbers are wrong. Any other error of an import, a compiler or a driver passes through.
    """
    compiled()  # first, so that nothing is allocated without Triton
    columns, row_counts = torch.tensor([2, 0, 2], device=device), torch.tensor([1, 2], device=device)
    ones = torch.ones(BLOCK_TOKENS + 1, 3, device=device, dtype=dtype)
    values, sums = sampled_product(ones[:, :2], ones, build_structure(columns, row_counts, 2, 3))
    if not bool((torch.cat([values, sums]) == len(ones)).all()):
        raise ArithmeticError("wrong numbers")


@cache
def compiled() -> Any:
    """Return the kernel, which Triton compiles on its first launch.

    Raises:
        ImportError: Triton is not installed.
    """
    global tl  # a kernel looks it up among the globals
    import triton
    import triton.language as tl

    return triton.jit(_kernel)


def sampled_product(grad_output: Tensor, inputs: Tensor, structure: Structure) -> tuple[Tensor, Tensor]:
    """Return `(grad_outputᵀ @ inputs)` at the selected entries, and the sums of `grad_output` over the tokens.

    The same operands give the same bits every time, because no sum depends on the order in which programs run.

    Args:
        grad_output: `(tokens, neurons)` float32, bfloat16 or float16, with any strides.
        inputs: in the same dtype; `(tokens, used)`, the columns `structure.union`, or `(tokens, inputs)`, all columns.
        structure: where the selected entries lie.

    Returns:
        `(nnz,)` and `(neurons,)`, both summed in float32.
    """
    tokens, neurons = grad_output.shape
    entries = structure.positions.numel()
    blocks = -(-neurons // BLOCK_NEURONS)
    most = min(PROGRAMS // blocks, PRODUCT_ELEMENTS // max(entries, neurons), -(-tokens // TOKENS_PER_PROGRAM))
    splits = max(most, 1)
    share = -(-tokens // (splits * BLOCK_TOKENS)) * BLOCK_TOKENS
    values = torch.empty(splits, entries, device=grad_output.device, dtype=torch.float32)
    sums = torch.empty(splits, neurons, device=grad_output.device, dtype=torch.float32)
    with torch.cuda.device_of(grad_output):  # Triton launches on the current device
        compiled()[(blocks, splits)](
            grad_output,
            inputs,
            structure.row_starts,
            structure.union_positions,
            structure.union,
            values,
            sums,
            tokens,
            neurons,
            entries,
            share,
            *grad_output.stride(),
            *inputs.stride(),
            ALL_COLUMNS=inputs.shape[1] != structure.union.numel(),
            BLOCK_TOKENS=BLOCK_TOKENS,
            BLOCK_NEURONS=BLOCK_NEURONS,
            enable_fp_fusion=True,  # the default, but Triton 3.9 warns if it is not given
        )
    return (values.sum(0), sums.sum(0)) if splits > 1 else (values[0], sums[0])


def _kernel(  # type: ignore[no-untyped-def]  # Triton takes annotations for types of its own
    grad_output,
    inputs,
    row_starts,
    positions,
    union,
    values,
    sums,
    tokens,
    neurons,
    entries,
    share,
    grad_token,
    grad_neuron,
    input_token,
    input_column,
    ALL_COLUMNS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_NEURONS: tl.constexpr,
):
    """Compute one block of neurons over one share of the tokens: the sums of `grad_output`, then entry by entry."""
    split = tl.program_id(1).to(tl.int64)  # here and below, because offsets may exceed 32 bits
    neuron = tl.program_id(0) * BLOCK_NEURONS + tl.arange(0, BLOCK_NEURONS)
    exists = neuron < neurons
    start = tl.load(row_starts + neuron, mask=exists, other=0)
    count = tl.load(row_starts + neuron + 1, mask=exists, other=0) - start
    grad_columns = grad_output + neuron.to(tl.int64)[None, :] * grad_neuron
    first = split * share
    last = tl.minimum(first + share, tokens)

    total = tl.zeros((BLOCK_TOKENS, BLOCK_NEURONS), tl.float32)
    for tile in range(first, last, BLOCK_TOKENS):
        token = (tile + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)[:, None]
        mask = (token < last) & exists[None, :]
        total += tl.load(grad_columns + token * grad_token, mask=mask, other=0).to(tl.float32)
    tl.store(sums + split * neurons + neuron, tl.sum(total, 0), mask=exists)

    for k in range(0, tl.max(count, 0)):  # the k-th entries of all neurons at once
        entry = start + k
        present = k < count
        column = tl.load(positions + entry, mask=present, other=0)
        if ALL_COLUMNS:
            column = tl.load(union + column, mask=present, other=0)
        input_columns = inputs + column.to(tl.int64)[None, :] * input_column
        total = tl.zeros((BLOCK_TOKENS, BLOCK_NEURONS), tl.float32)
        for tile in range(first, last, BLOCK_TOKENS):
            token = (tile + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)[:, None]
            mask = (token < last) & present[None, :]
            grad = tl.load(grad_columns + token * grad_token, mask=mask, other=0)
            read = tl.load(input_columns + token * input_token, mask=mask, other=0)
            total += grad.to(tl.float32) * read.to(tl.float32)
        tl.store(values + split * entries + entry, tl.sum(total, 0), mask=present)
