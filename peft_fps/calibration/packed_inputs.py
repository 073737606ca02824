"""The inputs that each matrix of a stacked weight multiplies, such as those of the tokens routed to each expert.

The module that owns the weight gathers the tokens of an expert and multiplies them with a part of the weight. So the
calls of PyTorch's products show the inputs, and where a part lies in the weight shows its matrix. transformers'
modules run their plain implementation meanwhile, which multiplies the matrices one by one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from peft_fps.base.attention import Projection
from peft_fps.base.packed_weight import PackedWeight
from peft_fps.calibration.attention_inputs import watch_attention


PRODUCTS = {torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm}
GATHERS = {Tensor.__getitem__, torch.index_select, Tensor.index_select}
EAGER = "eager"
"""transformers' name of the plain implementation of experts."""


@dataclass(frozen=True)
class Rows:
    """The rows that inputs have in the input of their module.

    Attributes:
        index: `(rows,)` integers.
        of: input of the module, `(tokens, inputs)`.
    """

    index: Tensor
    of: Tensor


Receive = Callable[[PackedWeight, str, int, Tensor, Rows | None], None]
"""Takes a weight, its path, the index of a matrix, its inputs `(rows, inputs)`, and which rows they are, if known."""


def watch_packed(weights: Mapping[str, PackedWeight], receive: Receive) -> list[Any]:
    """Hand over the inputs of every matrix of weights in each call of the modules that own them.

    Args:
        weights: by path.
        receive: gets the inputs.

    Returns:
        Handles of hooks, to be removed.
    """
    attention = {path: weight for path, weight in weights.items() if isinstance(weight, Projection)}
    handles = watch_attention(attention, receive)
    return handles + watch_stacked({path: w for path, w in weights.items() if path not in attention}, receive)


def watch_stacked(weights: Mapping[str, PackedWeight], receive: Receive) -> list[Any]:
    """Hand over the inputs of every matrix of stacked weights in each call of the modules that own them.

    Args:
        weights: by path.
        receive: gets the inputs.

    Returns:
        Handles of hooks, to be removed.
    """
    modules: dict[int, dict[str, PackedWeight]] = {}
    for path, weight in weights.items():
        modules.setdefault(id(weight.owner), {})[path] = weight
    return [handle for own in modules.values() for handle in _watch_module(own, receive)]


def _watch_module(weights: Mapping[str, PackedWeight], receive: Receive) -> list[Any]:
    """Put hooks on a module that hand over the inputs of its stacked weights in each call. Return their handles."""
    running: list[ExpertInputs] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        running.append(ExpertInputs(weights, args[0] if args else next(iter(kwargs.values())), receive))
        running[-1].__enter__()

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        running.pop().__exit__(None, None, None)

    owner = next(iter(weights.values())).owner
    return [
        owner.register_forward_pre_hook(before, with_kwargs=True),
        owner.register_forward_hook(after, with_kwargs=True, always_call=True),
    ]


class ExpertInputs(TorchFunctionMode):
    """Context of one call of a module that hands over the inputs of every product with its stacked weights.

    Args:
        weights: of the module, by path.
        hidden: input of the module, `(tokens, inputs)`.
        receive: gets the inputs.
    """

    def __init__(self, weights: Mapping[str, PackedWeight], hidden: Tensor, receive: Receive) -> None:
        super().__init__()
        self._weights = {_memory(weight.weight): (path, weight) for path, weight in weights.items()}
        self._hidden = hidden
        self._receive = receive
        self._rows: Rows | None = None
        owner = next(iter(weights.values())).owner
        self._config: Any = getattr(owner, "config", None)
        self._before: Any = None

    def __enter__(self) -> "ExpertInputs":
        if hasattr(self._config, "_experts_implementation_internal"):
            self._before = self._config._experts_implementation_internal
            self._config._experts_implementation_internal = EAGER
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        if hasattr(self._config, "_experts_implementation_internal"):
            self._config._experts_implementation_internal = self._before

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func in PRODUCTS or func is F.linear:
            first, second = [value for value in (*args, *(kwargs or {}).values()) if isinstance(value, Tensor)][:2]
            self._see(first, second.transpose(-1, -2) if func is F.linear else second)
        elif func in GATHERS and isinstance(args[0], Tensor) and _memory(args[0]) == _memory(self._hidden):
            index = next((value for value in args[1:] if isinstance(value, Tensor) and value.dim() == 1), None)
            if args[0].dim() == 2 and index is not None and not index.dtype.is_floating_point:
                index = index.nonzero()[:, 0] if index.dtype == torch.bool else index
                self._rows = Rows(index, args[0])
        return func(*args, **(kwargs or {}))

    def _see(self, x: Tensor, part: Tensor) -> None:
        """Hand over the inputs of `x @ part`, if one of the two is a part of a weight."""
        if _memory(x) in self._weights:
            x, part = part.transpose(-1, -2), x.transpose(-1, -2)
        if _memory(part) not in self._weights:
            return
        path, packed = self._weights[_memory(part)]
        weight, (out, inputs) = packed.weight, packed.sizes
        if part.shape[-2:] != (inputs, out) or part.stride(-2) != weight.stride(1 if packed.transposed else 2):
            raise ValueError(
                f"{path}: {type(packed.owner).__name__} multiplies {tuple(x.shape)} with a part of it as "
                f"{tuple(part.shape[-2:])}, expected ({inputs}, {out}) with inputs along the "
                f"{'second' if packed.transposed else 'last'} of its dimensions {tuple(weight.shape)}. Leave it out "
                "of target_parameters. Nothing was changed."
            )
        each = weight.stride(0)
        first = (part.storage_offset() - weight.storage_offset()) // each
        if part.dim() == 2:
            self._hand_over(packed, path, first, x)
            return
        for index in range(part.shape[0]):
            matrix = first + index * part.stride(0) // each
            self._hand_over(packed, path, matrix, x[index] if x.dim() == part.dim() else x)

    def _hand_over(self, weight: PackedWeight, path: str, matrix: int, x: Tensor) -> None:
        flat = x.detach().reshape(-1, x.shape[-1])
        # what is computed from gathered rows keeps their order
        known = self._rows is not None and self._rows.index.numel() == len(flat)
        self._receive(weight, path, matrix, flat, self._rows if known else None)


def _memory(tensor: Tensor) -> int:
    """Return the address of a tensor's storage, which views of the tensor share."""
    return tensor.untyped_storage().data_ptr()
