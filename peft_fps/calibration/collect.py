"""Hooks that gather input statistics while a model runs."""

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from peft_fps.base.packed_weight import PackedWeight
from peft_fps.base.substitution import CONVOLUTIONS, TRANSPOSED, overrides_forward
from peft_fps.calibration.batch_padding import padding_of, reads_beside_texts
from peft_fps.calibration.noted_calls import note_calls
from peft_fps.calibration.own_forward import WatchedProduct
from peft_fps.calibration.packed_inputs import Rows, watch_packed
from peft_fps.calibration.padding import Padding, is_padding_unknown, mask_of, mask_of_tokens
from peft_fps.calibration.statistics import (
    InputStatistics,
    Unmasked,
    add_rows,
    check_dense,
    column_sums,
    token_counts,
)
from peft_fps.calibration.tap_sums import convolution_sums


@dataclass(frozen=True)
class Observed:
    """A layer to observe.

    Attributes:
        module: the module that the model calls with the layer's input.
        base: the linear layer or convolution that multiplies this input with its weight, or the embedding that looks
            it up.
        groups: number of groups of neurons that read different inputs. 1 except in grouped convolutions and in
            stacked weights.
        inputs: fan-in of a neuron.
        own_forward: whether only the product shows what is multiplied: the base layer overrides forward and may change
            its input first, or is a transposed convolution, whose geometry may depend on a call's `output_size`.
        sharing: embeddings that look tokens up in the same weight, by module path. Their inputs count too.
    """

    module: nn.Module
    base: nn.Module
    groups: int
    inputs: int
    own_forward: bool = False
    sharing: Mapping[str, nn.Module] = field(default_factory=dict)


class Collector:
    """Context in which every call of the given layers within a batch adds to the layer's input statistics.

    Layers that read one tensor, such as query and key projections, share its reduction. Calls between two batches do
    not count, because the model itself may generate the data.

    Attributes:
        statistics: input statistics of the layers that were called, by module path.

    Args:
        layers: layers to observe, by module path.
        norm: `"l1"` for sums of |a|, `"l2"` for sums of a², `"signed"` for sums of a.
        model: model whose calls show which positions are padding. A batch may take several calls. Default: only the
            batch shows it.
    """

    def __init__(self, layers: Mapping[str, Observed], norm: str, model: nn.Module | None = None) -> None:
        self.statistics: dict[str, InputStatistics] = {}
        self._layers, self._norm, self._model = layers, norm, model
        self._end_noting: Callable[[], None] | None = None
        self._within = False
        self._batch: Mapping[str, Any] = {}
        self._known: Mapping[str, Any] = {}
        self._padding = Padding()
        self._reduced: dict[tuple[int, int], tuple[weakref.ref[Tensor], int, tuple[Tensor, int]]] = {}
        self._touched: dict[str, None] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> "Collector":
        packed = {path: layer.base for path, layer in self._layers.items() if isinstance(layer.base, PackedWeight)}
        named = [] if self._model is None else self._model.named_modules()
        # the adapted model may be a part of this one, whose name tells what the layer reads
        places = {id(module): name.removesuffix(".base_layer") for name, module in named}
        self._handles += watch_packed(packed, self._add_matrix)
        for path, layer in ((path, layer) for path, layer in self._layers.items() if path not in packed):
            place = places.get(id(layer.module), path)
            self._observe(path, place, layer.module, layer.base, layer.own_forward)
            for place, module in layer.sharing.items():
                self._observe(path, place, module, module, overrides_forward(module))
        if self._model is not None:
            self._end_noting = note_calls(self._model, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._reduced.clear()
        if self._end_noting is not None:
            self._end_noting()
            self._end_noting = None

    def start_batch(self, batch: Any, model: nn.Module | None = None) -> None:
        """Count the calls from now on, and find out which positions of the batch are padding.

        Args:
            batch: batch that goes to the model. A mapping, or a tuple or list that begins with one, shows padding; see
                `padding_of`.
            model: model that is called with it.
        """
        self._touched.clear()
        inputs = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        self._batch = inputs if isinstance(inputs, Mapping) else {}
        self._start_call({}, model)
        self._within = True

    def _note(self, inputs: Mapping[str, Any], model: nn.Module) -> Callable[[], None]:
        """Start a call of the model, or of a model inside it, and return what ends it."""
        before = self._padding
        if model is self._model or not reads_beside_texts(model, inputs, self._known):
            self._start_call(inputs, model)
            return lambda: None
        self._reduced.clear()
        self._padding = padding_of(inputs, model)
        return lambda: setattr(self, "_padding", before)

    def _start_call(self, inputs: Mapping[str, Any], model: nn.Module | None) -> None:
        """Find out which positions are padding in a call of the model with `inputs` by name."""
        self._reduced.clear()
        # the batch too, because the call may leave out the batch's masks
        self._known = {**self._batch, **inputs}
        self._padding = padding_of(self._known, model)

    def check_batch(self, index: int) -> None:
        """End a batch.

        Args:
            index: number of the batch, for the error.

        Raises:
            ValueError: an input of a module is not finite. The error names the first such module.
        """
        self._within = False
        for path in self._touched:
            if not bool(torch.isfinite(self.statistics[path].sums).all()):
                raise ValueError(
                    f"{path}: its input holds NaN or infinity in calibration batch {index}, expected finite "
                    "activations. Check that batch, or run the model in a wider dtype (float32). Nothing was changed."
                )

    def _observe(self, path: str, place: str, module: nn.Module, base: nn.Module, own_forward: bool) -> None:
        """Let calls of a module add to the statistics of a layer.

        Args:
            path: module path of the layer.
            place: module path of the module.
            module: the layer, or one that shares its weight.
            base: its base layer.
            own_forward: whether only the product shows the input; see `Observed`.
        """
        if own_forward:
            self._watch(path, place, base)
            return

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._within:
                self._add(path, place, base, args[0] if args else next(iter(kwargs.values())))

        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _watch(self, path: str, place: str, base: nn.Module) -> None:
        """Observe a layer by the tensor that it multiplies with its weight, or looks up in it.

        Args:
            path: module path of the layer to whose statistics the tensor is added.
            place: module path of the layer that is called.
            base: its base layer.
        """
        watched: list[WatchedProduct] = []

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            watched.append(WatchedProduct(base))
            watched[-1].__enter__()

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            product = watched.pop()
            product.__exit__(None, None, None)
            if product.first is None and isinstance(base, nn.Embedding):
                return  # reads rows of its weight in another way, by numbers that nothing shows
            x, equivalent = product.first or (args[0] if args else next(iter(kwargs.values())), base)
            self._add(path, place, equivalent, x)

        self._handles.append(base.register_forward_pre_hook(before, with_kwargs=True))
        self._handles.append(base.register_forward_hook(after, with_kwargs=True, always_call=True))

    def _add_matrix(self, weight: PackedWeight, path: str, matrix: int, x: Tensor, rows: Rows | None = None) -> None:
        """Add inputs of one matrix of the stacked weight at `path`; see `Receive`."""
        if not self._within or x.numel() == 0:
            return
        mask = mask_of(x if rows is None else rows.of, self._padding, path)
        if mask is not None:
            mask = mask.reshape(-1) if rows is None else mask.reshape(-1)[rows.index]
        found = self.statistics.setdefault(path, InputStatistics.of_groups(weight.matrices, x))
        if mask is None and is_padding_unknown(x, self._padding, path, flat=True):
            found.unmasked = Unmasked(tuple(x.shape), self._padding.telling)
        add_rows(found, matrix, x, self._norm, mask, gated=weight.gated)
        self._touched[path] = None

    def _add(self, path: str, place: str, base: nn.Module, x: Tensor) -> None:
        """Add an input to the statistics of a layer.

        Args:
            path: module path of the layer.
            place: module path of the module that got the input: the layer, or one that shares its weight.
            base: linear layer or convolution that multiplies the input with its weight, or embedding that looks it up.
            x: the input; `(..., inputs)` of a linear layer.
        """
        check_dense(path, x)
        if x.numel() == 0:  # an expert to which no token was routed
            return
        sums, positions, unmasked = self._reduce(place, base, x)
        if path not in self.statistics:
            self.statistics[path] = InputStatistics(torch.zeros_like(sums))
        if unmasked:
            self.statistics[path].unmasked = Unmasked(tuple(x.shape), self._padding.telling)
        self.statistics[path].sums += sums
        self.statistics[path].positions += positions
        self._touched[path] = None

    def _reduce(self, path: str, base: nn.Module, x: Tensor) -> tuple[Tensor, int, bool]:
        """Return the sums of an input, `(groups, inputs)`, the number of positions, and if padding may be among them.

        Args:
            path: module path of the layer.
            base: linear layer or convolution that multiplies the input with its weight, or embedding that looks it up.
            x: the input.
        """
        if isinstance(base, CONVOLUTIONS + TRANSPOSED):
            sequences = x.dim() == 3 and len(base.kernel_size) == 1
            steps = x.transpose(1, 2) if sequences else None
            mask = None if steps is None else mask_of(steps, self._padding, path)
            sums, positions = convolution_sums(x.detach(), base, self._norm, mask)
            # a convolution that gives another number of positions than it gets counts all
            told = mask is not None and positions == int((mask != 0).sum())
            return sums, positions, not told and is_padding_unknown(x if steps is None else steps, self._padding, path)
        if isinstance(base, nn.Embedding):
            mask = mask_of_tokens(x, self._padding, path)
            counts, positions = token_counts(x, base.num_embeddings, mask)
            return counts[None], positions, False
        mask = mask_of(x, self._padding, path)
        unmasked = mask is None and is_padding_unknown(x, self._padding, path)
        key = (id(x), id(mask))
        version = 0 if x.is_inference() else x._version
        known = self._reduced.get(key)
        if known is not None and known[0]() is x and known[1] == version:
            return (*known[2], unmasked)
        sums, positions = column_sums(x.detach(), self._norm, mask)
        # a weak reference tells whether `x` is the same tensor, because a new one may have the id of a freed one
        self._reduced[key] = (weakref.ref(x), version, (sums[None], positions))
        return sums[None], positions, unmasked
