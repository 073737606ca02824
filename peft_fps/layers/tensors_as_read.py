"""What a model gets that reads the weight or the bias off an adapted layer in place of calling it.

State space models do so: they hand the weight of their short convolution to a function. They get W + ΔW, with
gradients for ΔW. Many models read no more than a weight's dtype or shape, for which no sum is formed.

What is read passes for the parameter that it stands for: a model that ties its weights again assigns it to another
module, which gets the parameter itself.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

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


IN_PLACE = {
    "__set__",
    "__setitem__",
    "__iadd__",
    "__isub__",
    "__imul__",
    "__idiv__",
    "__itruediv__",
    "__ifloordiv__",
    "__imod__",
    "__ipow__",
    "__iand__",
    "__ior__",
    "__ixor__",
    "__ilshift__",
    "__irshift__",
}
"""What changes the first of its arguments, besides the methods and functions with an underscore at the end."""

KEEPING = {"requires_grad_", "share_memory_", "detach_"}
"""Methods with an underscore at the end that leave the numbers as they are."""


class ChangedTensor(Tensor):
    """A frozen tensor with a change that is added when the numbers are needed.

    What describes it, and what writes to it in place, is the frozen tensor's.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function of torch on the frozen tensor where that suffices, else on the changed one."""
        kwargs = kwargs or {}
        name = func.__name__
        describes = func.__self__.__name__ not in VIEWS if name == "__get__" else name in DESCRIPTIONS
        in_place = name in IN_PLACE or (name.endswith("_") and not name.endswith("__"))
        # torch.nn.init passes what it writes to by name
        first = (0 if args else next(iter(kwargs), None)) if in_place else None
        given: dict[Any, Any] = dict(enumerate(args)) | kwargs
        if _writes(func, args):
            for each in _flat([given[key] for key in (first, "out") if key in given]):
                if isinstance(each, ChangedTensor):
                    vars(each)["noticed"]()

        def replaced(argument: Any, key: int | str) -> Any:
            if isinstance(argument, (list, tuple)):
                return (list if isinstance(argument, list) else tuple)(replaced(part, key) for part in argument)
            if isinstance(argument, ChangedTensor):
                return frozen_of(argument) if describes or key in (first, "out") else vars(argument)["changed"]()
            return argument

        with torch._C.DisableTorchFunctionSubclass():
            result = func(
                *(replaced(argument, key) for key, argument in enumerate(args)),
                **{key: replaced(argument, key) for key, argument in kwargs.items()},
            )
        # what writes in place returns what it has written to
        target = given.get(first if in_place else "out")
        return target if isinstance(target, ChangedTensor) and result is frozen_of(target) else result


def _flat(arguments: list[Any]) -> list[Any]:
    """Return arguments, with the elements of a list or a tuple in its place."""
    return [each for held in arguments for each in (held if isinstance(held, (list, tuple)) else [held])]


def _writes(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether a function writes numbers to what it changes in place, as far as its name and arguments tell."""
    if func.__name__ == "__set__":
        return bool(func.__self__.__name__ == "data")
    by_one = len(args) == 2 and isinstance(args[1], (int, float)) and args[1] == 1
    return func.__name__ not in KEEPING and not (by_one and func.__name__ in ("mul_", "div_"))


def frozen_of(argument: Any) -> Any:
    """Return the frozen tensor that a `ChangedTensor` stands for, or the argument itself."""
    return vars(argument)["frozen"] if isinstance(argument, ChangedTensor) else argument


def as_read(frozen: Tensor, changed: Callable[[], Tensor], noticed: Callable[[], None], path: str) -> Tensor:
    """Return a tensor that is `changed()` in every computation, which is called for each.

    Args:
        frozen: a tensor of its shape, dtype and device.
        changed: returns its numbers, with gradients.
        noticed: called before something writes to the frozen tensor in place.
        path: of the tensor in the model, for messages.
    """
    if torch.compiler.is_compiling() or is_jit_tracing() or needs_operators(frozen):
        return changed()
    _watch_registrations()
    held = frozen.detach()
    if type(held) is not Tensor:  # a DTensor, of which torch makes no subclass; none of its numbers is looked at here
        held = torch.empty(frozen.shape, dtype=frozen.dtype, device="meta")
    result: Tensor = torch.Tensor._make_subclass(ChangedTensor, held)
    is_parameter = isinstance(frozen, nn.Parameter)
    # torch's mark of a parameter that is of another class
    vars(result).update(frozen=frozen, changed=changed, noticed=noticed, path=path, _is_param=is_parameter)
    return result


def _registered(module: nn.Module, name: str, parameter: Any) -> Any:
    """Hook on what modules register as their parameters: they get the parameter itself, not what stands for it.

    Raises:
        ValueError: the module did not have that parameter before. It would not follow the changes.
    """
    if not isinstance(parameter, ChangedTensor):
        return None
    frozen = frozen_of(parameter)
    if module._parameters.get(name) is not frozen:
        raise ValueError(
            f"{vars(parameter)['path']} has an adapter, and is assigned to a {type(module).__name__} as its {name}, "
            "expected weights that were tied before the adapter was attached: the module would not follow the "
            "adapter's changes. Tie the weights of the base model first, or merge the adapter with "
            "model.merge_and_unload(). Nothing was changed."
        )
    return frozen


@cache
def _watch_registrations() -> None:
    """Let every module hand what it registers as its parameter to `_registered`, from the first tensor read on.

    torch has no such hook for the modules of one model.
    """
    register_module_parameter_registration_hook(_registered)
