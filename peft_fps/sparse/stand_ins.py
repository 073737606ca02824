"""Tensors that stand in for a module's parameters in a call, and are formed again in backward instead of being kept.

The module's own products save the dense W + ΔW that they multiply with. Autograd's hooks on saved tensors let go of it
behind the call, and form it again for the products' backward.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from peft_fps.sparse.compose import changed_weight
from peft_fps.sparse.structure import Structure
from peft_fps.sparse.transforms import is_transformed


class StandIn:
    """A tensor that stands in for a parameter in one call of a module. It is made when the module first reads it.

    Args:
        make: gives the tensor in the parameter's shape and dtype, with its gradients.
        form: gives it again for backward, without a gradient. Default: the tensor is kept for backward.
    """

    def __init__(self, make: Callable[[], Tensor], form: Callable[[], Tensor] | None = None) -> None:
        self._make = make
        self._form = form
        self._tensor: Tensor | None = None
        self._present: Tensor | None = None
        self._packed = self._left = 0

    def tensor(self) -> Tensor:
        """Return the tensor."""
        if self._tensor is None:
            self._tensor = self._make()
        return self._tensor

    def end(self) -> None:
        """Let go of the tensor, since the call is over."""
        self._tensor = None

    def is_part(self, tensor: Tensor) -> bool:
        """Whether a tensor that is to be kept is a part of this one, which can be formed again."""
        made = self._tensor
        if made is None or self._form is None or not made.requires_grad or tensor.dtype != made.dtype:
            return False
        return tensor.untyped_storage().data_ptr() == made.untyped_storage().data_ptr()

    def pack(self, tensor: Tensor) -> Any:
        """Return what is kept of a part."""
        self._packed += 1
        self._left = self._packed
        return self, tensor.size(), tensor.stride(), tensor.storage_offset()

    def unpack(self, *view: Any) -> Tensor:
        """Return a part again. All parts are of one tensor, which the last of them takes along."""
        assert self._form is not None
        present = self._form() if self._present is None else self._present
        self._left -= 1
        self._present = present if self._left else None
        self._left = self._left or self._packed  # a graph may be kept for another backward
        return present.as_strided(*view)


def changed_stand_in(weight: Tensor, values: Tensor, structure: Structure) -> StandIn:
    """Return a stand-in for W + ΔW, with a gradient for `values`.

    Forming it again raises RuntimeError if weight or values have changed meanwhile.

    Args:
        weight: stored weight W of any shape; it gets no gradient.
        values: `(nnz,)` ΔW at the selected entries.
        structure: where the selected entries lie.
    """
    if torch.compiler.is_compiling():  # the compiler decides what is kept, and cannot ask for versions
        return StandIn(lambda: changed_weight(weight, values, structure))
    known, versions = values.detach(), _versions(weight, values)

    def form() -> Tensor:
        if _versions(weight, known) != versions:
            raise RuntimeError(
                "A weight or its sparse change was modified in place between forward and backward (merged, or changed "
                "by an optimizer's step), expected backward before that."
            )
        with torch.no_grad():
            return changed_weight(weight, known, structure)

    return StandIn(lambda: changed_weight(weight, values, structure), form)


@contextmanager
def formed_again(stand_ins: Iterable[StandIn]) -> Iterator[None]:
    """Context of a call that keeps nothing of the stand-ins for its backward.

    Where other hooks on saved tensors are in force, such as those of gradient checkpointing, they decide.
    """
    used = list(stand_ins)
    hooked = torch.compiler.is_compiling() or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
    if hooked or not torch.is_grad_enabled() or is_transformed():
        yield
        return

    def pack(tensor: Tensor) -> Any:
        found = next((each for each in used if each.is_part(tensor)), None)
        return tensor if found is None else found.pack(tensor)

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        found, *view = packed
        part: Tensor = found.unpack(*view)
        return part

    try:
        with saved_tensors_hooks(pack, unpack):
            yield
    finally:
        for each in used:
            each.end()


def _versions(*tensors: Tensor) -> list[int]:
    """Return the numbers of in-place changes of tensors; those made in inference mode do not count them."""
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]
