"""What is known of the tensor that was produced, or read, last: a note that outlives neither the tensor nor its use.

A note holds tensors, so only the latest one of each kind is kept (per thread): whoever reads a tensor does so soon
after it was produced, and beside its other readers. Nothing is written on the tensor itself, which would be pickled
with it.
"""

import threading
import weakref
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor


Note = TypeVar("Note")


class Latest(Generic[Note]):
    """The latest note on a tensor.

    Under gradient checkpointing a part of the network runs twice, and must keep tensors of the same shapes both times.
    So a note counts only within the run of the part in which it was made, which is known by its saved-tensor hooks.
    """

    def __init__(self) -> None:
        self._slot = threading.local()

    def set(self, tensor: Tensor, note: Note) -> None:
        """Replace the note."""
        slot = vars(self._slot)
        slot.clear()
        slot["known"] = (weakref.ref(tensor, lambda _: slot.clear()), version(tensor), _run(), note)

    def get(self, tensor: Tensor) -> Note | None:
        """Return the note on this very tensor, None if there is none or the tensor has changed since."""
        found = vars(self._slot).get("known")
        if found is None:
            return None
        known, noted, run, note = found
        here = _run()
        same_run = run is here if run is None or here is None else run() is not None and run() is here()
        return note if known() is tensor and noted == version(tensor) and same_run else None


def version(tensor: Tensor) -> int:
    """Number of in-place changes so far; tensors made in inference mode do not count them."""
    return 0 if tensor.is_inference() else tensor._version


def _run() -> Any:
    """A weak reference to the saved-tensor hooks in force, None if there are none."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return None if hooks is None else weakref.ref(hooks[0])
