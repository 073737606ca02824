"""What an FPS layer keeps of its input for backward, given where the input comes from.

A normalisation or an activation keeps its own input in any case, and its output, the FPS layer's input, can be formed
again from that, bit for bit. Attention keeps its output, which may be the very memory that the FPS layer reads. Where
neither holds, the needed columns are copied, once for all layers that read one tensor.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import activations

from peft_fps.sparse import Kept, Reading, Structure, keep_columns, keep_whole


NORMS = (nn.LayerNorm, nn.RMSNorm)
"""Normalisations over the last dimension; so are transformers' own classes named `...RMSNorm`."""

ELEMENTWISE = (
    nn.GELU,
    nn.SiLU,
    activations.GELUActivation,
    activations.FastGELUActivation,
    activations.NewGELUActivation,
    activations.QuickGELUActivation,
    activations.GELUTanh,
    activations.SiLUActivation,
)
"""Activations that keep their input for backward."""

KEEPS_OUTPUT = ("ScaledDotProduct", "Relu")
"""How the names of autograd nodes begin that keep their output for backward."""

VIEWS = ("ViewBackward0", "TransposeBackward0", "PermuteBackward0", "ReshapeAliasBackward0", "AliasBackward0")
"""Autograd nodes whose output shares its memory with their input."""


@dataclass(frozen=True)
class Producer:
    """The module call that produced a tensor, noted on that tensor."""

    module: nn.Module
    input: Tensor
    version: int
    autocast: tuple[bool, torch.dtype]


def watch_producers(model: nn.Module) -> None:
    """Let normalisations and activations note on their outputs how to form them again."""
    for module in model.modules():
        rebuildable = isinstance(module, NORMS + ELEMENTWISE) or type(module).__name__.endswith("RMSNorm")
        if rebuildable and _note_producer not in module._forward_hooks.values():
            module.register_forward_hook(_note_producer)


def unwatch_producers(model: nn.Module) -> None:
    """Remove what `watch_producers` has added."""
    for module in model.modules():
        for key in [key for key, hook in module._forward_hooks.items() if hook is _note_producer]:
            del module._forward_hooks[key]


def keep_input(x: Tensor, product_dtype: torch.dtype, structure: Structure, saved_inputs: str) -> Kept | None:
    """Choose what a layer keeps of its input.

    Args:
        x: `(..., inputs)` as the layer got it.
        product_dtype: dtype in which the product reads it.
        structure: says which columns are needed.
        saved_inputs: see `FPSConfig`.

    Returns:
        What to keep; None where nothing is known of `x` (a leaf, a transformed or a traced function).
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or x.grad_fn is None:
        return None
    with torch.no_grad():
        producer = getattr(x, "_fps_producer", None)
        if producer is not None and producer.version == x._version and _is_rebuilt(structure, saved_inputs):
            return _keep_source(producer, product_dtype, structure)
        flat = x.detach().reshape(-1, structure.inputs)
        if x.dtype == product_dtype and (_memory_is_kept(x) or structure.union.numel() == structure.inputs):
            return keep_whole(flat)
        kept_dtype = torch.bfloat16 if saved_inputs == "bfloat16" else product_dtype
        key = (x._version, kept_dtype)
        if getattr(x, "_fps_reading", (None,))[0] != key:
            x._fps_reading = (key, Reading())  # type: ignore[attr-defined]
        reading: Reading = x._fps_reading[1]  # type: ignore[attr-defined]
        return keep_columns(flat, structure, reading, kept_dtype, product_dtype)


def _is_rebuilt(structure: Structure, saved_inputs: str) -> bool:
    """Whether an input that can be rebuilt is; under "auto", if the copy would be more than half of it."""
    return saved_inputs == "rebuild" or (saved_inputs == "auto" and 2 * structure.union.numel() > structure.inputs)


def _note_producer(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook: note the call on its output, if calling the class's own forward again gives that output again."""
    if torch.compiler.is_compiling() or not (isinstance(output, Tensor) and output.grad_fn is not None):
        return
    alone = len(module._forward_hooks) == 1 and "forward" not in vars(module)
    if alone and len(args) == 1 and isinstance(args[0], Tensor) and args[0].requires_grad and args[0] is not output:
        kind = output.device.type
        enabled = torch.is_autocast_enabled(kind)
        autocast = (enabled, torch.get_autocast_dtype(kind) if enabled else output.dtype)
        output._fps_producer = Producer(module, args[0], output._version, autocast)  # type: ignore[attr-defined]


def _keep_source(producer: Producer, dtype: torch.dtype, structure: Structure) -> Kept:
    """Keep the input of the module that produced a layer's input, and its parameters, all of them held already."""
    module, (enabled, autocast_dtype) = producer.module, producer.autocast
    parameters = list(module.parameters())

    def columns(source: Tensor, *parameters: Tensor) -> Tensor:
        elementwise = isinstance(module, ELEMENTWISE)
        with torch.autocast(source.device.type, dtype=autocast_dtype if enabled else None, enabled=enabled):
            if elementwise:
                source = source.index_select(-1, structure.union)
            output = type(module).forward(module, source)
        return output.reshape(-1, output.shape[-1]).to(dtype)

    return Kept((producer.input.detach(), *parameters), columns)


def _memory_is_kept(x: Tensor) -> bool:
    """Whether the node that computed `x`, views aside, keeps this very memory for its own backward."""
    return any(node.name().startswith(KEEPS_OUTPUT) for node in _behind_views(x.grad_fn))


def _behind_views(node: Any) -> Iterator[Any]:
    while node is not None and node.name() in VIEWS:
        node = node.next_functions[0][0]
    if node is not None:
        yield node
