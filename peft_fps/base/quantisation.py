"""Base layers with quantised weights: what they are, how to read them densely, and how to write them back.

PEFT's quantisation backends dequantise and quantise. They are taken by the layer's class rather than by PEFT's
`resolve_quantization_backend`, which imports every quantisation library that is installed.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from peft.utils.quantization_utils import (
    Bnb4bitBackend,
    Bnb8bitBackend,
    HqqBackend,
    QuantizationBackend,
    TorchaoBackend,
)
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D


SUPPORTED = "bitsandbytes 8-bit and 4-bit, torchao, or HQQ"

Held = Mapping[str, Any]
"""Attributes of a base layer that hold its quantised weight, by name."""


@dataclass(frozen=True)
class Quantisation:
    """How a base layer is quantised.

    Attributes:
        make_backend: makes PEFT's backend.
        weight: name of the attribute that stores the weight.
        held: names of the attributes that writing the weight anew replaces.
    """

    make_backend: Callable[[], QuantizationBackend]
    weight: str
    held: tuple[str, ...]


@dataclass(frozen=True)
class BaseWeight:
    """A base layer's weight that is read when it is needed.

    Attributes:
        read: gives it, dequantised if it is quantised.
        device: where it is stored.
        stored_as: its dtype (`"float32"`), or how it is quantised (`"bnb 4bit"`).
        transposed: whether it is stored as `(inputs, neurons)`.
    """

    read: Callable[[], Tensor]
    device: torch.device
    stored_as: str
    transposed: bool = False


KINDS = {
    "bitsandbytes.Linear8bitLt": Quantisation(Bnb8bitBackend, "weight", ("weight", "state")),
    "bitsandbytes.Linear4bit": Quantisation(Bnb4bitBackend, "weight", ("weight", "quant_state")),
    "hqq.HQQLinear": Quantisation(HqqBackend, "W_q", ("W_q", "meta")),
}
TORCHAO = Quantisation(lambda: TorchaoBackend(None), "weight", ("weight",))


def quantisation(module: Any) -> Quantisation | None:
    """Return how a linear layer is quantised, None if it is not, or in a way that is not supported."""
    names = _lineage(module)
    known = next((kind for name, kind in KINDS.items() if name in names), None)
    if known is None and isinstance(module, nn.Linear):
        return TORCHAO if is_of_torchao(module._parameters.get("weight")) else None
    return known


def is_of_torchao(tensor: object) -> bool:
    """Return whether torchao has quantised a tensor."""
    return "torchao.TorchAOBaseTensor" in _lineage(tensor)


def is_made_of_others(tensor: Tensor) -> bool:
    """Whether a tensor is of a class that keeps its numbers in other tensors, quantised ones say.

    What is written into such a tensor in place may be lost without an error. Sharded tensors do not count.
    """
    return hasattr(type(tensor), "__tensor_flatten__") and not isinstance(tensor, DTensor)


def _lineage(thing: object) -> frozenset[str]:
    """Return the names of an object's class and of the bases of that class, each behind its package's name."""
    kind: Any = type(thing)
    return _names(kind)


@cache
def _names(kind: type) -> frozenset[str]:
    """Names of a class and its bases behind their package's; the package need not be imported to compare them."""
    return frozenset(f"{base.__module__.partition('.')[0]}.{base.__name__}" for base in kind.__mro__)


def stored_weight(base: Any) -> Tensor:
    """Return the tensor that stores a base layer's weight: itself, or the packed numbers of a quantised one."""
    kind = quantisation(base)
    return getattr(base, "weight" if kind is None else kind.weight)


def base_weight(base: Any) -> BaseWeight:
    """Return how to read the weight of any base layer."""
    kind, stored = quantisation(base), stored_weight(base)
    if kind is not None:
        return BaseWeight(partial(dense_weight, base), stored.device, kind.make_backend().backend_name)
    dtype = str(stored.dtype).removeprefix("torch.")
    return BaseWeight(lambda: stored, stored.device, dtype, isinstance(base, Conv1D))


def quantised_elements(module: Any) -> int:
    """Return the number of weights that a quantised layer stands for, and HQQ's bias, which is no parameter."""
    size = int(module.in_features * module.out_features)
    bias = getattr(module, "bias", None)
    return size if bias is None or "bias" in module._parameters else size + bias.numel()


def check_quantised(name: str, base: Any) -> None:
    """Raise ValueError if a quantised layer is not in a state in which its weight can be read.

    Args:
        name: its module path.
        base: the layer.
    """
    weight: Any = stored_weight(base)
    attributes = {} if weight is None else vars(weight)
    if attributes.get("has_fp16_weights", False):
        raise ValueError(
            f"{name} is a {type(base).__name__} with has_fp16_weights=True, expected int8 weights. Load the base "
            "model with BitsAndBytesConfig(load_in_8bit=True), or leave the module out with exclude_modules."
        )
    if weight is not None and weight.device.type == "meta":
        return
    unquantised_8bit = "SCB" in attributes and weight.dtype != torch.int8
    unquantised_4bit = "quant_state" in attributes and weight.quant_state is None
    if weight is None or unquantised_8bit or unquantised_4bit:
        found = "no weight yet" if weight is None else f"its weight still in {weight.dtype}"
        raise ValueError(
            f"{name} ({type(base).__name__}) has {found}, expected a quantised one. bitsandbytes quantises when the "
            "model is moved to its device: call model.to(device) before the adapter is added."
        )


@torch.no_grad()
def dense_weight(base: Any, backend: QuantizationBackend | None = None) -> Tensor:
    """Return the weight of a quantised layer, dequantised: a new floating tensor `(neurons, inputs)`.

    Args:
        base: the layer.
        backend: PEFT's backend for it; made anew if None.
    """
    state = getattr(stored_weight(base), "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        return _unpacked(base.weight, state)
    kind = quantisation(base)
    assert kind is not None
    return (backend or kind.make_backend()).get_base_weight(base).detach()


def _unpacked(weight: Any, state: Any) -> Tensor:
    """Dequantise a 4-bit weight that bitsandbytes has packed anew for inference on a CPU with bfloat16 instructions.

    PEFT's backend reads such a weight as if it were not packed; the layer's own tensors stay as they are.
    """
    functional: Any = import_module("bitsandbytes.functional")
    absmax = state.absmax.T.contiguous().reshape(-1).float()
    plain = copy.copy(state)
    plain.original_nested = False  # what was nested was resolved when the weight was packed
    packed, plain = functional._convert_weight_packed_for_cpu_inverse(weight.data, plain)
    plain.absmax, plain.nested = absmax, False
    return functional.dequantize_4bit(packed, plain)


def keep_unpacked(model: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights on the CPU, and unpack those that it has packed.

    On CPUs with bfloat16 instructions bitsandbytes 0.50 packs a weight for good in the first evaluation, calibration
    included. From then on its product passes no gradient on, without a word where the layer has no bias, and its
    stored numbers are no longer those that dequantising expects.

    Args:
        model: that gets an adapter.
    """
    for module in model.modules():
        if not getattr(module, "support_avx512bf16_for_cpu", False):
            continue
        layer: Any = module
        layer.support_avx512bf16_for_cpu = False
        state = getattr(layer.weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            functional = import_module("bitsandbytes.functional")
            layer.weight.data, layer.weight.quant_state = functional._convert_weight_packed_for_cpu_inverse(
                layer.weight.data, state
            )
            layer.quant_state = layer.weight.quant_state


def requantised(base: Any, dense: Tensor, backend: QuantizationBackend) -> Held:
    """Quantise another weight as the layer's own is, and return what would hold it; the layer stays as it is.

    Args:
        base: the layer.
        dense: `(neurons, inputs)` floating, in the dtype that `dense_weight` gave.
        backend: PEFT's backend for it.
    """
    kind = quantisation(base)
    assert kind is not None
    carrier = copy.copy(base)  # backends write to the layer, and to attributes of its weight and state
    carrier.__dict__["_parameters"] = dict(base._parameters)
    if hasattr(base, "state"):
        carrier.state = copy.copy(base.state)
    if isinstance(backend, Bnb4bitBackend):
        carrier.weight = copy.copy(base.weight)
        carrier.weight.module = carrier
    layer = SimpleNamespace(base_layer=carrier, get_base_layer=lambda: carrier)
    with torch.no_grad():
        backend.set_base_weight(layer, dense)
    held = {name: getattr(layer.base_layer, name) for name in kind.held}
    found, expected = type(held[kind.weight]), type(getattr(base, kind.weight))
    if found is not expected:
        raise ValueError(
            f"quantising the merged weight gave a {found.__name__}, expected a {expected.__name__} as before. Keep "
            "the adapter unmerged."
        )
    return held


def held_by(base: Any) -> Held:
    """Return what holds the layer's quantised weight now."""
    kind = quantisation(base)
    assert kind is not None
    return {name: getattr(base, name) for name in kind.held}


def put(base: Any, held: Held) -> None:
    """Make a layer hold what `held_by` or `requantised` gave."""
    for name, value in held.items():
        setattr(base, name, value)
    if hasattr(held.get("weight"), "module"):  # bitsandbytes' 4-bit weights know their layer
        base.weight.module = base
