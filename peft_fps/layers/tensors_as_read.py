"""What a model gets that reads the weight or the bias off an adapted layer in place of calling it.

State space models do so: they hand the weight of their short convolution to a function. They get W + ΔW, with
gradients for ΔW. Many models read no more than a weight's dtype or shape, for which no sum is formed.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from peft_fps.sparse import is_jit_tracing, needs_operators


VIEWS = {"T", "mT", "H", "mH", "real", "imag"}
"""Properties of a tensor that hold its numbers. All others describe it, or are its memory."""

DESCRIPTIONS = {
    "__len__",
    "data_ptr",
    "dim",
    "element_size",
    "get_device",
    "is_complex",
    "is_contiguous",
    "is_floating_point",
    "ndimension",
    "nelement",
    "numel",
    "size",
    "storage_offset",
    "stride",
    "untyped_storage",
}
"""Methods of a tensor that describe it."""


class ChangedTensor(Tensor):
    """A frozen tensor with a change that is added when the numbers are needed.

    What describes it, and what writes to it in place, is the frozen tensor's.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function of torch on the frozen tensor where that suffices, else on the changed one."""
        name = func.__name__
        if name == "__get__":
            describes = func.__self__.__name__ not in VIEWS
        else:
            describes = name in DESCRIPTIONS or (name.endswith("_") and not name.endswith("__")) or name == "__set__"

        def replaced(argument: Any) -> Any:
            if isinstance(argument, (list, tuple)):
                return (list if isinstance(argument, list) else tuple)(map(replaced, argument))
            if isinstance(argument, ChangedTensor):
                held = vars(argument)
                return held["frozen"] if describes else held["changed"]()
            return argument

        with torch._C.DisableTorchFunctionSubclass():
            return func(*replaced(list(args)), **{key: replaced(value) for key, value in (kwargs or {}).items()})


def as_read(frozen: Tensor, changed: Callable[[], Tensor]) -> Tensor:
    """Return a tensor that is `changed()` in every computation, which is called for each.

    Args:
        frozen: a tensor of its shape, dtype and device.
        changed: returns its numbers, with gradients.
    """
    if torch.compiler.is_compiling() or is_jit_tracing() or needs_operators(frozen):
        return changed()
    held = frozen.detach()
    if type(held) is not Tensor:  # a DTensor, of which torch makes no subclass; none of its numbers is looked at here
        held = torch.empty(frozen.shape, dtype=frozen.dtype, device="meta")
    result: Tensor = torch.Tensor._make_subclass(ChangedTensor, held)
    vars(result).update(frozen=frozen, changed=changed)
    return result
