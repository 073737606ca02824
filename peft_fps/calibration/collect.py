"""Hooks that gather input statistics while a model runs."""

import inspect
import re
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from peft_fps.calibration.own_forward import WatchedProduct
from peft_fps.calibration.padding import Padding, padding_of
from peft_fps.calibration.statistics import InputStatistics, column_sums, pad_like, patch_sums


DECODER = re.compile(r"(^|[._])decoder\.")
CROSS_ATTENTION = re.compile(r"(cross|encdec|encoder_?attn)([^.]*|.*\.(k|v|key|value)(_proj)?)$", re.IGNORECASE)
"""Paths of the modules of a decoder, and of those among them that read the encoder's states."""


@dataclass(frozen=True)
class Observed:
    """A layer to observe: the module that is called, and the base layer that says how it reads its input.

    Attributes:
        module: called with the layer's input.
        base: a linear layer, or a convolution.
        groups: groups of neurons that read different inputs (grouped convolutions), else 1.
        inputs: fan-in of a neuron.
        own_forward: whether the base layer may make something else of its input before it multiplies.
    """

    module: nn.Module
    base: nn.Module
    groups: int
    inputs: int
    own_forward: bool = False


class Collector:
    """Context in which every call of the given layers within a batch adds to its input statistics.

    Layers that read one tensor (query, key and value projections) share its reduction. Calls between two batches do
    not count: data may be made by the model itself.

    Args:
        layers: what to observe, by module path.
        norm: `"l1"` or `"l2"`.
        model: whose calls say which positions are padding; a batch may take several.
    """

    def __init__(self, layers: Mapping[str, Observed], norm: str, model: nn.Module | None = None) -> None:
        self.statistics: dict[str, InputStatistics] = {}
        self._layers = layers
        self._norm = norm
        self._model = model
        self._forward: Callable[..., Any] | None = None
        self._within = False
        self._batch: Mapping[str, Any] = {}
        self._padding = Padding()
        self._reduced: dict[tuple[int, int], tuple[weakref.ref[Tensor], int, tuple[Tensor, int]]] = {}
        self._touched: dict[str, None] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> "Collector":
        for path, layer in self._layers.items():
            if layer.own_forward:
                self._watch(path, layer.base)
                continue
            hook = self._hook(path, layer.base)
            self._handles.append(layer.module.register_forward_pre_hook(hook, with_kwargs=True))
        if self._model is not None:
            # PEFT calls a base model's forward itself, which no hook of the module would notice
            self._forward = vars(self._model).get("forward")
            self._model.forward = self._watched(self._model, self._model.forward)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._reduced.clear()
        if self._model is not None:
            vars(self._model).pop("forward", None)
            if self._forward is not None:
                self._model.forward = self._forward

    def start_batch(self, batch: Any, model: nn.Module | None = None) -> None:
        """Count from now on, and note which positions are padding in what is about to go to the model.

        Args:
            batch: of data; see `padding_of` for a mapping, which may stand first in a tuple.
            model: as there.
        """
        self._touched.clear()
        inputs = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        self._batch = inputs if isinstance(inputs, Mapping) else {}
        self._start_call({}, model)
        self._within = True

    def _start_call(self, inputs: Mapping[str, Any], model: nn.Module | None) -> None:
        self._reduced.clear()
        # a forward may leave out what its batch says of padding
        self._padding = padding_of({**self._batch, **inputs}, model)

    def _watched(self, model: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        names = list(inspect.signature(forward).parameters)

        @wraps(forward)
        def watched(*args: Any, **kwargs: Any) -> Any:
            alone = args[0] if args and isinstance(args[0], Mapping) else {}
            self._start_call({**dict(zip(names, args, strict=False)), **kwargs, **alone}, model)
            return forward(*args, **kwargs)

        return watched

    def check_batch(self, index: int) -> None:
        """End a batch; raise ValueError if it brought an input that is not finite, naming the first module."""
        self._within = False
        for path in self._touched:
            if not bool(torch.isfinite(self.statistics[path].sums).all()):
                raise ValueError(
                    f"{path}: its input holds NaN or infinity in calibration batch {index}, expected finite "
                    "activations. Check that batch, or run the model in a wider dtype (float32). Nothing was changed."
                )

    def _hook(self, path: str, base: nn.Module) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._within:
                self._add(path, base, args[0] if args else next(iter(kwargs.values())))

        return hook

    def _watch(self, path: str, base: nn.Module) -> None:
        """Let every call of a layer with a forward of its own add what it multiplies with its weight."""
        watched: list[WatchedProduct] = []

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            watched.append(WatchedProduct(base))
            watched[-1].__enter__()

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            product = watched.pop()
            product.__exit__(None, None, None)
            x, alike = product.found or (args[0] if args else next(iter(kwargs.values())), base)
            self._add(path, alike, x)

        self._handles.append(base.register_forward_pre_hook(before, with_kwargs=True))
        self._handles.append(base.register_forward_hook(after, with_kwargs=True, always_call=True))

    def _add(self, path: str, base: nn.Module, x: Tensor) -> None:
        if x.numel() == 0:  # an expert that no token was routed to
            return
        sums, positions = self._reduce(path, base, x)
        if path not in self.statistics:
            self.statistics[path] = InputStatistics(torch.zeros_like(sums))
        self.statistics[path].sums += sums
        self.statistics[path].positions += positions
        self._touched[path] = None

    def _reduce(self, path: str, base: nn.Module, x: Tensor) -> tuple[Tensor, int]:
        if isinstance(base, nn.Conv2d):
            batched = x if x.dim() == 4 else x[None]
            return patch_sums(pad_like(batched.detach(), base), base, self._norm)
        mask = self._mask(path, x)
        key = (id(x), id(mask))
        version = 0 if x.is_inference() else x._version
        known = self._reduced.get(key)
        if known is not None and known[0]() is x and known[1] == version:
            return known[2]
        sums, positions = column_sums(x.detach(), self._norm, mask)
        # a weak reference: a tensor that is gone may have left its id to another one
        self._reduced[key] = (weakref.ref(x), version, (sums[None], positions))
        return sums[None], positions

    def _mask(self, path: str, x: Tensor) -> Tensor | None:
        """The mask whose positions are those of `x`; a decoder's own comes first where it reads its own states."""
        own = bool(DECODER.search(path)) and not CROSS_ATTENTION.search(path)
        masks = [self._padding.decoder, self._padding.inputs]
        if not own:
            masks.reverse()
        for mask in masks[:1] if self._padding.separate else masks:
            if mask is not None and _fits(mask, x):
                return mask
        return None


def _fits(mask: Tensor, x: Tensor) -> bool:
    """Whether the positions of `x`, in a batch or in a row, are those of the mask."""
    return x.shape[:-1] == mask.shape or (x.dim() == 2 and x.shape[0] == mask.numel() and mask.shape[1] > 1)
