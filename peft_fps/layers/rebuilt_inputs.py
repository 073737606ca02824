"""What an FPS layer keeps of its input for backward, given where the input comes from.

A normalisation or an activation keeps its own input in any case, and its output, the FPS layer's input, can be formed
again from that, bit for bit. Attention keeps its output, which may be the very memory that the FPS layer reads. Where
neither holds, the needed columns are copied, once for all layers that read one tensor.
"""

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from transformers import activations

from peft_fps.layers.entry_structures import tensor_version
from peft_fps.sparse import Kept, Reading, Structure, is_jit_tracing, keep_columns, keep_whole, needs_operators


PRODUCERS = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GELU,
    nn.SiLU,
    activations.GELUActivation,
    activations.FastGELUActivation,
    activations.NewGELUActivation,
    activations.QuickGELUActivation,
    activations.GELUTanh,
    activations.SiLUActivation,
)
"""Modules that keep their input for backward, and give the same output for it; so do transformers' own RMSNorms."""

KEEPS_OUTPUT = ("ScaledDotProduct", "Relu")
"""How the names of autograd nodes begin that keep their output for backward."""

VIEWS = ("ViewBackward0", "TransposeBackward0", "PermuteBackward0", "ReshapeAliasBackward0", "AliasBackward0")
"""Autograd nodes whose output shares its memory with their input."""


Note = TypeVar("Note")


class Latest(Generic[Note]):
    """The latest note on a tensor: what is known of the one that was produced, or read, last.

    A note holds tensors, so only the latest one of each kind is kept (per thread): a tensor is read soon after it was
    produced, and beside its other readers. Nothing is written on the tensor itself, which would be pickled with it.

    Under gradient checkpointing a part of the network runs twice, and must keep tensors of the same shapes both times.
    So a note counts only within the run of the part in which it was made, which is known by its saved-tensor hooks.
    """

    def __init__(self) -> None:
        self._slot = threading.local()

    def set(self, tensor: Tensor, note: Note) -> None:
        """Replace the note."""
        slot = vars(self._slot)
        slot.clear()
        slot["known"] = (weakref.ref(tensor, lambda _: slot.clear()), tensor_version(tensor), _run(), note)

    def get(self, tensor: Tensor) -> Note | None:
        """Return the note on this very tensor, None if there is none or the tensor has changed since."""
        found = vars(self._slot).get("known")
        if found is None:
            return None
        known, noted, run, note = found
        here = _run()
        same_run = run is here if run is None or here is None else run() is not None and run() is here()
        return note if known() is tensor and noted == tensor_version(tensor) and same_run else None


@dataclass(frozen=True)
class Producer:
    """The call that produced a tensor.

    Attributes:
        form: what was called: gives the tensor again, bit for bit, from `tensors`, whatever has become of the module.
        tensors: its input and its parameters, as they were in the call.
        versions: numbers of in-place changes of these tensors, as they were in the call.
        autocast: whether it was on in the call, and its dtype.
    """

    form: Callable[..., Tensor]
    tensors: list[Tensor]
    versions: list[int]
    autocast: tuple[bool, torch.dtype]

    @property
    def unchanged(self) -> bool:
        """Whether the tensors are still held and still those of the call."""
        return bool(self.tensors) and self.versions == [tensor_version(tensor) for tensor in self.tensors]


_producer: Latest[Producer] = Latest()
_reading: Latest[tuple[torch.dtype, Reading]] = Latest()


def watch_producers(model: nn.Module) -> None:
    """Let normalisations and activations note how to form their outputs again. Adapted norms do so by themselves."""
    adapted = {id(layer.base_layer) for layer in model.modules() if isinstance(layer, BaseTunerLayer)}
    for module in model.modules():
        kind = type(module)
        norm = kind.__name__.endswith("RMSNorm") and kind.__module__.startswith("transformers.")
        if id(module) in adapted:
            unwatch_producers(module)
        elif (norm or kind in PRODUCERS) and _note_call not in module._forward_hooks.values():
            module.register_forward_hook(_note_call)


def unwatch_producers(model: nn.Module) -> None:
    """Remove what `watch_producers` has added."""
    for module in model.modules():
        for key in [key for key, hook in module._forward_hooks.items() if hook is _note_call]:
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
    if torch.compiler.is_compiling() or needs_operators(x) or x.grad_fn is None:
        return None
    with torch.no_grad():
        producer = _producer.get(x)
        if saved_inputs == "rebuild" and producer is not None and producer.unchanged:
            return _keep_source(producer, product_dtype)
        flat = x.detach().reshape(-1, structure.inputs)
        alias = x.dtype == product_dtype and flat.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        if alias and (_memory_is_kept(x) or structure.union.numel() == structure.inputs):
            return keep_whole(flat)
        kept_dtype = torch.bfloat16 if saved_inputs == "bfloat16" else product_dtype
        known_dtype, reading = _reading.get(x) or (None, Reading())
        if known_dtype != kept_dtype:
            reading = Reading()
            _reading.set(x, (kept_dtype, reading))
        return keep_columns(flat, structure, reading, kept_dtype, product_dtype)


def note_producer(output: Tensor, form: Callable[..., Tensor], tensors: list[Tensor]) -> None:
    """Note that `output` is `form(*tensors)`, where the graph holds the tensors for the backward of that call.

    Nothing is noted under `torch.compile`, in a trace of `torch.jit`, or if the output has no gradient function.

    Args:
        output: what the call gave.
        form: gives `output` again from the tensors, bit for bit.
        tensors: its arguments, as they were in the call.
    """
    if torch.compiler.is_compiling() or is_jit_tracing() or output.grad_fn is None:
        return
    kind = output.device.type
    enabled = torch.is_autocast_enabled(kind)
    tensors = [tensor.detach() for tensor in tensors]
    autocast = (enabled, torch.get_autocast_dtype(kind) if enabled else output.dtype)
    _producer.set(output, Producer(form, tensors, [tensor_version(tensor) for tensor in tensors], autocast))


def _note_call(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook: note the call, if calling the class's own forward again gives that output again."""
    if torch.compiler.is_compiling() or is_jit_tracing():
        return
    if not (isinstance(output, Tensor) and output.grad_fn is not None):
        return
    hooks = (module._forward_pre_hooks, _global_forward_pre_hooks, _global_forward_hooks)
    alone = len(module._forward_hooks) == 1 and not any(hooks) and "forward" not in vars(module)
    source = args[0] if len(args) == 1 else None
    if alone and isinstance(source, Tensor) and source is not output and _keeps_input(module, source):
        names = [name for name, _ in module.named_parameters()]
        note_producer(output, partial(_call_again, module, names), [source, *module.parameters()])


def _call_again(module: nn.Module, names: list[str], source: Tensor, *parameters: Tensor) -> Tensor:
    """Run a module's forward again, with the parameters that it had in the noted call.

    Args:
        module: the module.
        names: names of its parameters.
        source: its input.
        parameters: in the order of the names.
    """
    return functional_call(module, dict(zip(names, parameters, strict=True)), (source,))


def _keeps_input(module: nn.Module, source: Tensor) -> bool:
    """Whether the graph holds the module's input for the module's own backward."""
    # other norms than LayerNorm compute in float32, and keep a float32 copy of a smaller input
    return source.requires_grad and ("RMSNorm" not in type(module).__name__ or source.dtype.itemsize >= 4)


def _keep_source(producer: Producer, dtype: torch.dtype) -> Kept:
    """Keep the input of the call that produced a layer's input, and its parameters, all of them held already."""
    enabled, autocast_dtype = producer.autocast

    def columns(source: Tensor, *parameters: Tensor) -> Tensor:
        producer.tensors.clear()  # the note has served its purpose
        with torch.autocast(source.device.type, dtype=autocast_dtype if enabled else None, enabled=enabled):
            output = producer.form(source, *parameters)
        return output.detach().reshape(-1, output.shape[-1]).to(dtype)

    return Kept(tuple(producer.tensors), columns)


def _memory_is_kept(x: Tensor) -> bool:
    """Whether the node that computed `x`, views aside, keeps this very memory for its own backward."""
    node: Any = x.grad_fn
    while node is not None and node.name() in VIEWS:
        node = node.next_functions[0][0]
    return node is not None and node.name().startswith(KEEPS_OUTPUT)


def _run() -> Any:
    """Return a weak reference to the saved-tensor hooks in force, None if there are none."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return None if hooks is None else weakref.ref(hooks[0])
