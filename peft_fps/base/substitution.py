"""Run a base layer with other tensors in place of its parameters, whatever its forward makes of them."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D as TransformersConv1D

from peft_fps.base.quantisation import is_made_of_others, quantisation


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
KINDS = (nn.Linear, TransformersConv1D, *CONVOLUTIONS, *TRANSPOSED, nn.Embedding)

METHODS = ("_conv_forward", "_output_padding")
"""What the forward of torch's convolutions calls, which a subclass or a layer may replace in place of forward."""

SIZES = (3, 2, 1)
"""Size of the examples on which a convolution is tried, beyond its kernel."""


def call_with(base: Any, tensors: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """Call a layer, hooks included, with other tensors for some of its parameters; `base` stays untouched.

    Args:
        base: any layer.
        tensors: by the names of its parameters, in their shapes.
        args: of its forward, as are `kwargs`.
    """
    if torch.compiler.is_compiling():
        return functional_call(base, tensors, args, kwargs)
    return twin_with(base, tensors)(*args, **kwargs)


def twin_with(base: Any, tensors: dict[str, Any]) -> Any:
    """Return a layer that shares everything with `base`, hooks included, except for some of its parameters.

    Unlike `functional_call` it is safe while another thread runs the layer. A forward that someone put over the
    layer's own, as accelerate's hooks do, is rebound to the twin if it is a method bound to the layer, or a
    `functools.partial` whose first argument is the layer. A closure still reads the layer itself.

    Args:
        base: any layer; stays untouched.
        tensors: by the names of its parameters.
    """
    twin = copy.copy(base)
    twin.__dict__.update({name: _rebound(held, base, twin) for name, held in vars(twin).items()})
    twin.__dict__["_parameters"] = base._parameters | tensors
    return twin


def overrides_forward(base: Any) -> bool:
    """Whether the class of an unquantised layer has another forward than the kind of layer that it is.

    The methods that torch's own forward calls count too, also where the layer itself has another one.
    """
    kind: Any = next((kind for kind in KINDS if isinstance(base, kind)), None)
    if kind is None or quantisation(base) is not None:
        return False
    own: Any = type(base)
    replaced = any(getattr(own, name, None) is not getattr(kind, name, None) for name in METHODS)
    return replaced or own.forward is not kind.forward or any(name in vars(base) for name in METHODS)


def follows_its_weight(base: Any) -> bool | None:
    """Whether a layer's own forward with another weight in place is what it is with that weight written into it.

    That is tried with small inputs. It does not hold for a forward that reads a copy of its weight made before, or
    does not read its weight at all. A weight into which nothing can be written is to be multiplied with the input.

    Returns:
        None where the forward cannot be tried: it takes other arguments than an input, say.
    """
    if is_made_of_others(base.weight):
        return _is_product(base)
    with _undrawn(base), torch.no_grad():
        try:
            plain, written = (copy.deepcopy(_bare(base)).eval() for _ in range(2))
            x = _trial_input(base)
            before = plain(x)
            for name in ("weight", "bias"):
                if getattr(base, name, None) is None:
                    continue
                getattr(written, name).add_(_ramp(getattr(base, name)))
                changed = {n: getattr(written, n) for n in ("weight", "bias") if getattr(base, n, None) is not None}
                output = written(x)
                if not torch.allclose(twin_with(plain, changed)(x), output, rtol=1e-3, atol=1e-5):
                    return False
                if name == "weight" and torch.equal(before, output):
                    return False
        except Exception:  # whatever a stranger's forward raises on these inputs
            return None
    return True


def _is_product(base: Any) -> bool | None:
    """Whether a linear layer multiplies an input with its weight, within a rounding. None if that cannot be tried."""
    with _undrawn(base), torch.no_grad():
        try:
            x = _ramp(torch.empty(3, base.in_features, dtype=base.weight.dtype, device=base.weight.device))
            expected = F.linear(x, base.weight, base.bias)
            return torch.allclose(base(x), expected, rtol=0, atol=0.02 * float(expected.abs().max()))
        except Exception:  # whatever a stranger's forward raises on this input
            return None


def _bare(base: Any) -> Any:
    """Return a copy of the layer without hooks and without a forward put over its own, since others made them."""
    bare = copy.copy(base)
    for name in ("forward", "_hf_hook", "_old_forward"):
        bare.__dict__.pop(name, None)
    for name in [
        name for name in vars(bare) if name.endswith("_hooks") and name.startswith(("_forward", "_backward"))
    ]:
        bare.__dict__[name] = type(vars(bare)[name])()
    return bare


def _ramp(like: Tensor) -> Tensor:
    """Return numbers between -1 and 1, no two neighbours alike, in the shape and dtype of a tensor."""
    steps = torch.arange(like.numel(), device=like.device, dtype=torch.float32)
    return torch.sin(steps * 0.7 + 0.3).to(like.dtype).view(like.shape)


def _trial_input(base: Any) -> Tensor:
    """Return a small input. Tokens of an embedding make sense as a mask too, from which some derive positions."""
    if isinstance(base, nn.Embedding):
        return torch.tensor([[1, 0, 1]], device=base.weight.device).clamp(max=base.num_embeddings - 1)
    return _ramp(base.weight.new_empty(_input_shape(base)))


def _input_shape(base: Any) -> tuple[int, ...]:
    """Return the shape of the input on which `follows_its_weight` tries a layer."""
    if isinstance(base, CONVOLUTIONS + TRANSPOSED):
        extent = [(kernel - 1) * step + 1 for kernel, step in zip(base.kernel_size, base.dilation, strict=True)]
        return (1, base.in_channels, *(size + more for size, more in zip(extent, SIZES, strict=False)))
    return (3, base.weight.shape[0 if isinstance(base, TransformersConv1D) else 1])


@contextmanager
def _undrawn(base: Any) -> Iterator[None]:
    """Restore torch's random generators after the block, since the forward may draw numbers."""
    device = base.weight.device
    kind = device.type if device.type != "cpu" else "cuda"
    devices = [] if device.type == "cpu" else [device.index or 0]
    with torch.random.fork_rng(devices=devices, device_type=kind):
        yield


def _rebound(held: Any, base: Any, twin: Any) -> Any:
    """Return a method or partial that is bound to `base` as one bound to `twin`, and anything else unchanged."""
    if isinstance(held, MethodType) and held.__self__ is base:
        return MethodType(held.__func__, twin)
    if isinstance(held, partial) and held.args and held.args[0] is base:
        return partial(held.func, twin, *held.args[1:], **held.keywords)
    return held
