"""Products with ΔW alone, and the sampled product that is the gradient of the values.

The gradient of the values is `grad_outputᵀ @ inputs` at the selected entries. The gradient of the bias, the sum of
`grad_output` over the tokens, comes with it.

Several algorithms give the same numbers. PyTorch alone computes a dense product over the needed columns and gathers
the entries, or one dot product along the tokens per entry. The package `kernels` beside this module has compiled ones.
On the CPU a cost model decides between them; on CUDA they are measured.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_fps.sparse.kernels import cpu, cuda
from peft_fps.sparse.kernels.measured_choice import fastest, size_class
from peft_fps.sparse.structure import Structure
from peft_fps.sparse.transforms import needs_operators


# Cost of one dot product, and of making one column contiguous along the tokens, in multiply-adds of a dense product.
# Both are measured on the CPU with 200 to 6300 tokens. They decide between algorithms, not about results.
DOT_COST, COLUMN_COST = 5, 80
TILE_TOKENS = 800
"""Tokens that dot products take at once: few enough for the cache."""


def sampled_product(grad_output: Tensor, inputs: Tensor, structure: Structure) -> tuple[Tensor, Tensor]:
    """Return `(grad_outputᵀ @ inputs)` at the selected entries, and the sums of `grad_output` over the tokens.

    The function takes the fastest algorithm for the operands.

    Args:
        grad_output: `(tokens, neurons)`.
        inputs: in the same dtype; `(tokens, used)`, the columns `structure.union`, or `(tokens, inputs)`, all columns.
        structure: where the selected entries lie.

    Returns:
        `(nnz,)` and `(neurons,)`, the gradients of values and bias. Both are in the dtype of `grad_output`, or in
        float32 if a compiled kernel computes them.
    """
    batched = needs_operators(grad_output)
    if grad_output.numel() == 0 or structure.positions.numel() == 0:
        return grad_output.new_zeros(structure.positions.numel()), grad_output.sum(0)
    if not (batched or torch.compiler.is_compiling()):
        if grad_output.device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            return measured_product(grad_output, inputs, structure)
        if entries_are_few(structure) and cpu.fits(grad_output, inputs, structure):
            return cpu.sampled_product(grad_output, inputs, structure)
    float32 = grad_output.device.type == "cpu" and grad_output.dtype.itemsize >= 4
    product = product_by_dots if dots_are_cheaper(structure) and float32 and not batched else product_by_columns
    return product(grad_output, used_columns(inputs, structure), structure), grad_output.sum(0)


def measured_product(
    grad_output: Tensor, inputs: Tensor, structure: Structure, choose: Callable[..., str] = fastest
) -> tuple[Tensor, Tensor]:
    """Return what `sampled_product` does, by the algorithm that was the fastest for such operands on the device.

    Args:
        grad_output: `(tokens, neurons)`.
        inputs: as for `sampled_product`.
        structure: where the selected entries lie.
        choose: from a key and candidates by name to one of the names.
    """

    def by(product: Callable[[Tensor, Tensor, Structure], Tensor]) -> tuple[Tensor, Tensor]:
        return product(grad_output, used_columns(inputs, structure), structure), grad_output.sum(0)

    candidates: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
        "dense product over the needed columns": partial(by, product_by_columns),
        "dot products by an embedding bag": partial(by, product_by_dots),
    }
    if cuda.fits(grad_output, inputs, structure):
        candidates["Triton kernel"] = partial(cuda.sampled_product, grad_output, inputs, structure)
    sizes = size_class(*grad_output.shape, structure.union.numel(), structure.positions.numel())
    return candidates[choose((grad_output.device, grad_output.dtype, sizes), candidates)]()


def used_columns(inputs: Tensor, structure: Structure) -> Tensor:
    """Return the needed columns of an input that has all columns, `(tokens, used)`; or one that has these as it is."""
    used = structure.union.numel()
    return inputs if inputs.shape[1] == used else inputs.index_select(1, structure.union)


def entries_are_few(structure: Structure) -> bool:
    """Whether one dot product per entry costs less than a dense product, for a kernel that reads columns for free."""
    return DOT_COST * structure.positions.numel() < structure.neurons * structure.union.numel()


def dots_are_cheaper(structure: Structure) -> bool:
    """Whether one dot product per entry costs less than the dense product over the needed columns.

    The cost of the dot products includes that of making columns contiguous along the tokens.
    """
    used = structure.union.numel()
    dots = DOT_COST * structure.positions.numel() + COLUMN_COST * (structure.neurons + used)
    return structure.neurons * used > dots


def product_by_columns(grad_output: Tensor, used_inputs: Tensor, structure: Structure) -> Tensor:
    """Return `(grad_outputᵀ @ inputs)` at the selected entries, gathered from a dense product in chunks of neurons.

    Args:
        grad_output: `(tokens, neurons)`.
        used_inputs: needed columns of the input, `(tokens, used)`.
        structure: where the selected entries lie.

    Returns:
        `(nnz,)` in the dtype of `grad_output`.
    """
    parts = []
    for chunk in structure.chunks:
        entries = slice(chunk.first_entry, chunk.last_entry)
        # narrow, because [:, a:b] is an alias where it takes all columns, and batched gradients have no rule for that
        product = grad_output.narrow(1, chunk.first_row, chunk.last_row - chunk.first_row).t() @ used_inputs
        rows = structure.rows[entries].to(torch.int64) - chunk.first_row
        places = rows * structure.union.numel() + structure.union_positions[entries]
        parts.append(product.reshape(-1).index_select(0, places))
    return torch.cat(parts)


def product_by_dots(grad_output: Tensor, used_inputs: Tensor, structure: Structure) -> Tensor:
    """Return `(grad_outputᵀ @ inputs)` at the selected entries, by one dot product along the tokens per entry.

    PyTorch computes these dot products as the gradient of an embedding bag with respect to its per-sample weights. An
    entry is a sample, its neuron is the bag, and its column of the input is the embedding.

    Args:
        grad_output: `(tokens, neurons)`; on the CPU in float32 or float64.
        used_inputs: needed columns of the input, `(tokens, used)`.
        structure: where the selected entries lie.

    Returns:
        `(nnz,)` in the dtype of `grad_output`.
    """
    tiles = -(-grad_output.shape[0] // TILE_TOKENS)
    total = None
    for grad_tile, input_tile in zip(grad_output.tensor_split(tiles), used_inputs.tensor_split(tiles), strict=True):
        part = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            grad_tile.t().contiguous(),
            input_tile.t().contiguous(),
            structure.union_positions,
            structure.row_starts[:-1],
            structure.rows,
            0,  # bags are sums
        )
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def adding_is_cheaper(x: Tensor, weight: Tensor, values: Tensor, structure: Structure) -> bool:
    """Whether a product with ΔW beside the base product costs less than copying W to form W + ΔW.

    It does for few tokens on the CPU.

    Args:
        x: the layer's input `(tokens, inputs)`, or the gradient of its output `(tokens, neurons)`.
        weight: stored weight.
        values: `(nnz,)` ΔW at the selected entries.
        structure: where the selected entries lie.
    """
    plain = x.device.type == "cpu" and not torch.compiler.is_compiling() and not needs_operators(x)
    float32 = x.dtype == weight.dtype == values.dtype == torch.float32
    copied = x.shape[0] * (structure.neurons + structure.union.numel())
    return plain and float32 and 0 < copied < weight.numel() and structure.positions.numel() > 0


def added_product(x: Tensor, values: Tensor, structure: Structure) -> Tensor:
    """Return `x ΔWᵀ`, `(tokens, neurons)`, as an embedding bag: a neuron is a bag of weighted columns of `x`.

    Args:
        x: `(tokens, inputs)`.
        values: `(nnz,)` ΔW at the selected entries.
        structure: where the selected entries lie.
    """
    columns = x.t().index_select(0, structure.union)
    offsets = structure.row_starts[:-1]
    bags = F.embedding_bag(structure.union_positions, columns, offsets, mode="sum", per_sample_weights=values)
    return bags.t()


def add_input_gradient(grad_x: Tensor, grad_output: Tensor, values: Tensor, structure: Structure) -> None:
    """Add `grad_output ΔW` to `grad_x` in place, as an embedding bag: an input is a bag of weighted neurons.

    Args:
        grad_x: `(tokens, inputs)`.
        grad_output: `(tokens, neurons)`.
        values: `(nnz,)` ΔW at the selected entries.
        structure: where the selected entries lie.
    """
    order, neurons, starts = structure.by_column
    columns = grad_output.t().contiguous()
    grad_x.add_(F.embedding_bag(neurons, columns, starts, mode="sum", per_sample_weights=values[order]).t())
