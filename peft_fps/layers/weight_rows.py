"""Read a layer's base weight, wherever it is kept."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from peft_fps.layers.entry_layer import EntryLayer


def weight_rows(layer: EntryLayer, first: int, last: int) -> Tensor:
    """Return the rows `first:last` of the base weight seen as `(neurons, inputs)`."""
    with _brought(layer):
        return layer.weight_rows(first, last)


@contextmanager
def _brought(layer: EntryLayer) -> Iterator[None]:
    """Have a weight that accelerate offloads at hand, as a call of the layer would."""
    base = layer.base_layer
    hook = getattr(base, "_hf_hook", None)
    if hook is None or layer.weight_tensor.device.type != "meta":
        yield
        return
    try:
        hook.pre_forward(base)
        yield
    finally:
        hook.post_forward(base, None)
