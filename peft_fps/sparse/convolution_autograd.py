"""Convolutions and transposed convolutions with W + ΔW, over any number of spatial dimensions.

The forward saves the input, the weight (an alias) and the values, and no dense W + ΔW. The backward forms the dense
∂L/∂W for a moment, which is cheap beside the convolution itself, and takes the selected entries from it.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_fps.sparse.compose import compose_weight
from peft_fps.sparse.structure import Structure
from peft_fps.sparse.transforms import FirstDerivative, dense_sum, is_differentiated_again, needs_operators


class Geometry(NamedTuple):
    """What a zero-padded convolution is besides its weight; the first three hold one number per spatial dimension.

    Attributes:
        stride: as in `torch.nn.functional.conv2d`.
        padding: zeros on both sides of the input; of a transposed convolution, what is cut off its output instead.
        dilation: distance of neighbouring taps.
        groups: number of groups of channels. Default: 1.
        transposed: whether the convolution is transposed. Default: False.
        output_padding: what a transposed convolution's output has more at its ends, one number per spatial dimension.
            Default: nothing.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    transposed: bool = False
    output_padding: tuple[int, ...] = (0,)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Return the convolution of `x` with a dense weight, by operators with derivatives of any order.

    Args:
        x: `(batch, channels, *size)`, or one example `(channels, *size)`.
        weight: `(neurons, channels / groups, *kernel)`; transposed, `(channels, neurons / groups, *kernel)`.
        bias: `(neurons,)`, or None.
        geometry: all else that the convolution is.

    Returns:
        `(batch, neurons, *size)`, or `(neurons, *size)` for one example.
    """
    stride, padding, dilation, groups, transposed, output_padding = geometry
    batched = x if x.dim() == weight.dim() else x[None]
    result = torch.convolution(batched, weight, bias, stride, padding, dilation, transposed, output_padding, groups)
    return result if x.dim() == weight.dim() else result[0]


class _SparseConvolution(torch.autograd.Function):
    """Convolution of `x` `(batch, channels, *size)` with W + ΔW; the arguments are those of `sparse_convolution`."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        values: Tensor,
        bias: Tensor | None,
        structure: Structure,
        geometry: Geometry,
    ) -> Tensor:
        return convolve(x, compose_weight(weight, values, structure, x.dtype), bias, geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, values, _, structure, geometry = inputs
        ctx.structure, ctx.geometry, ctx.input_shape = structure, geometry, x.shape
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, weight, values)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, values = ctx.saved_tensors
        structure, geometry = ctx.structure, ctx.geometry
        grad_x = grad_values = grad_bias = None
        with torch.autocast(grad_output.device.type, enabled=False):
            again = is_differentiated_again()
            if ctx.needs_input_grad[0]:
                composed = (dense_sum if again else compose_weight)(weight, values, structure, grad_output.dtype)
                grad_x = input_gradient(ctx.input_shape, composed, grad_output, geometry)
            if ctx.needs_input_grad[2]:
                with torch.no_grad():
                    grad_weight = weight_gradient(x, weight.shape, grad_output, geometry)
                    grad_values = grad_weight.reshape(-1).index_select(0, structure.positions).to(values.dtype)
                if again:
                    grad_values = FirstDerivative.apply(grad_values, values, grad_output)
            if ctx.needs_input_grad[3]:
                grad_bias = grad_output.sum((0, *range(2, grad_output.dim())))
        return grad_x, None, grad_values, grad_bias, None, None


def input_gradient(shape: torch.Size, weight: Tensor, grad_output: Tensor, geometry: Geometry) -> Tensor:
    """Return the gradient of a convolution's input from the gradient of its output.

    Args:
        shape: of the input, `(batch, channels, *size)`.
        weight: dense, as in `convolve`.
        grad_output: gradient of the output, `(batch, neurons, *size)`.
        geometry: all else that the convolution is.
    """
    x = grad_output.new_empty(1).expand(shape)  # only its shape is read
    return _gradients(x, weight, grad_output, geometry, (True, False, False))[0]


def weight_gradient(x: Tensor, shape: torch.Size, grad_output: Tensor, geometry: Geometry) -> Tensor:
    """Return the dense gradient of a convolution's weight from the gradient of its output.

    Args:
        x: input, `(batch, channels, *size)`.
        shape: of the weight.
        grad_output: gradient of the output, `(batch, neurons, *size)`.
        geometry: all else that the convolution is.
    """
    weight = grad_output.new_empty(1).expand(shape)
    return _gradients(x, weight, grad_output, geometry, (False, True, False))[1]


def _gradients(
    x: Tensor, weight: Tensor, grad_output: Tensor, geometry: Geometry, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of a convolution's input, weight and bias, from ATen's backward.

    Args:
        x: input. Only its shape is read for the input's own gradient.
        weight: weight. Only its shape is read for the weight's own gradient.
        grad_output: gradient of the output.
        geometry: all else that the convolution is.
        wanted: which of the three to form. The others are undefined.
    """
    stride, padding, dilation, groups, transposed, output_padding = geometry
    gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
        grad_output, x, weight, None, stride, padding, dilation, transposed, output_padding, groups, wanted
    )
    return gradients


def sparse_convolution(
    x: Tensor,
    weight: Tensor,
    values: Tensor,
    bias: Tensor | None,
    structure: Structure,
    geometry: Geometry,
) -> Tensor:
    """Return the zero-padded convolution of `x` with W + ΔW, with the gradients of `sparse_linear`.

    Args:
        x: `(batch, channels, *size)`, or one example `(channels, *size)`; its dtype is the dtype of the product.
        weight: `(neurons, channels / groups, *kernel)`, or `(channels, neurons / groups, *kernel)` if the convolution
            is transposed.
        values: `(nnz,)` ΔW at the selected entries.
        bias: `(neurons,)` in the dtype of `x`, or None.
        structure: where the selected entries lie. Its columns index channels of a group and taps, flattened; see
            `Layout`.
        geometry: all else that the convolution is.

    Returns:
        `(batch, neurons, *size)` in the dtype of `x`, or `(neurons, *size)` for one example.
    """
    with torch.autocast(x.device.type, enabled=False):
        if needs_operators(x):
            return convolve(x, dense_sum(weight, values, structure, x.dtype), bias, geometry)
        batched = x if x.dim() == weight.dim() else x[None]
        result = _SparseConvolution.apply(batched, weight, values, bias, structure, geometry)
    return result if x.dim() == weight.dim() else result[0]
