"""FPS layers with sparse changes of the weight: which entries an adapter has, and their values."""

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from peft_fps.layers.adapter_state import AdapterState
from peft_fps.layers.entry_structures import Derived, StructuredLayer, checksum_of
from peft_fps.layers.fps_layer import FPSLayer
from peft_fps.layers.merge_record import MergeRecord, merge_entries
from peft_fps.selection import LayerShape
from peft_fps.selection.module_sizes import ModuleSizes
from peft_fps.sparse import Layout, check_entries, check_finite, check_floating, dense_delta, even_row_counts


UNLOADED_COLUMN = -1
"""Fills the columns of an adapter that was built from a saved config, until its tensors are loaded."""


class EntryLayer(StructuredLayer, FPSLayer):
    """A base layer with a weight, of which each adapter changes some entries, and the bias.

    Attributes:
        shape: of the weight seen as `(neurons, inputs)`.
        layout: how the weight is stored.
        sharing: modules outside of it that have the same weight, by path in the base model; only embeddings have such.
        fps_values: per adapter `(nnz,)`, ΔW at the selected entries.
        fps_columns: per adapter `(nnz,)` int32, strictly increasing within a neuron.
        fps_row_counts: per adapter `(neurons,)` int32, entries of each neuron.
    """

    adapter_layer_names: tuple[str, ...] = ("fps_values", "fps_bias")
    index_names = ("fps_columns", "fps_row_counts")
    other_param_names = (*index_names, *FPSLayer.other_param_names)
    fps_values: nn.ParameterDict
    fps_columns: BufferDict
    fps_row_counts: BufferDict

    def __init__(self, base_layer: Any, module_path: str) -> None:
        super().__init__(base_layer, module_path)
        self.shape, self.layout = self.shape_of(base_layer), self.layout_of(base_layer)
        self.sharing: dict[str, nn.Module] = {}
        self._derived = {}
        self._united = {}

    @classmethod
    def neurons_of(cls, base_layer: Any) -> int:
        """Return the number of rows of a base layer's weight."""
        return cls.shape_of(base_layer).neurons

    @classmethod
    def shape_of(cls, base_layer: Any) -> LayerShape:
        """Return the shape of a base layer's weight seen as `(neurons, inputs)`."""
        shape, layout = base_layer.weight.shape, cls.layout_of(base_layer)
        neurons = shape[1] * layout.groups if layout.transposed else shape[0]
        return LayerShape(neurons, shape.numel() // max(neurons, 1))

    @classmethod
    def layout_of(cls, base_layer: Any) -> Layout:
        """Return how a base layer's weight is stored. Default: by rows."""
        return Layout()

    @classmethod
    def barred_input(cls, base_layer: Any) -> int | None:
        """Return the input of a base layer that gets no entry, None if all may have entries."""
        return None

    @classmethod
    def selectable_shape(cls, base_layer: Any) -> LayerShape:
        """Return the shape of a base layer's weight without the input that gets no entry."""
        shape = cls.shape_of(base_layer)
        return shape if cls.barred_input(base_layer) is None else LayerShape(shape.neurons, shape.inputs - 1)

    def __getstate__(self) -> dict[str, Any]:
        # what is derived stays behind: a copy, or another process, checks the tensors anew
        return super().__getstate__() | {
            "_derived": {name: Derived(checksum=each.checksum) for name, each in self._derived.items()},
            "_united": {},
        }

    def sizes(self, adapter_name: str) -> ModuleSizes:
        """Return how large the adapter's part of this layer is, as a saved config records it."""
        entries = self.fps_columns[adapter_name].numel()  # the values may be partitioned
        return ModuleSizes(self.shape.neurons, self.shape.inputs, entries)

    # --- an adapter's life ------------------------------------------------------------------------------------------

    def update_layer(
        self, adapter_name: str, entries: int, bias: bool, state: AdapterState, inference_mode: bool = False
    ) -> None:
        """Add an adapter with room for `entries` entries that are still to be selected or loaded; see `FPSLayer`."""
        device, neurons = self._adapter_device(), self.shape.neurons
        blank = torch.full((entries,), torch.nan, dtype=self._values_dtype(), device=device)
        self.fps_values[adapter_name] = nn.Parameter(blank)
        self.fps_columns[adapter_name] = torch.full((entries,), UNLOADED_COLUMN, dtype=torch.int32, device=device)
        self.fps_row_counts[adapter_name] = even_row_counts(entries, neurons).to(device)
        if state.gate_penalty is not None:
            self._add_threshold(adapter_name)
        super().update_layer(adapter_name, entries, bias, state, inference_mode)

    def _add_threshold(self, adapter_name: str) -> None:
        if self.fps_threshold is None:
            self.fps_threshold = nn.ParameterDict({})
            self.adapter_layer_names = (*self.adapter_layer_names, "fps_threshold")
        blank = torch.full((1,), torch.nan, dtype=torch.float32, device=self._adapter_device())
        self.fps_threshold[adapter_name] = nn.Parameter(blank)

    def set_selection(self, adapter_name: str, columns: Tensor, row_counts: Tensor) -> None:
        """Give the adapter new entries and zero changes.

        The parameters stay the same objects, since an optimizer may hold them already.

        Args:
            adapter_name: name of the adapter.
            columns: `(nnz,)` integers, strictly increasing within a neuron.
            row_counts: `(neurons,)` integers, entries of each neuron.
        """
        columns, row_counts = check_entries(columns, row_counts, self.shape.neurons, self.shape.inputs)
        self.resize(adapter_name, columns.numel())
        device = self.fps_columns[adapter_name].device
        self.fps_columns[adapter_name] = columns.to(device, torch.int32)
        self.fps_row_counts[adapter_name] = row_counts.to(device, torch.int32)
        self.start_from_zero(adapter_name)
        if self.is_sharded(adapter_name):
            self.forget(adapter_name)
        elif self.is_prepared(adapter_name):
            self.renew(adapter_name)
        else:  # the first use derives it
            self._derived[adapter_name].checksum = checksum_of(columns, row_counts)

    def resize(self, adapter_name: str, entries: int) -> None:
        """Make room for another number of entries, whose columns and values are to be set next."""
        values = self.fps_values[adapter_name]
        if values.numel() != entries:
            values.data = values.data.new_full((entries,), torch.nan)
            values.grad = None
            self.fps_columns[adapter_name] = self.fps_columns[adapter_name].new_full((entries,), UNLOADED_COLUMN)

    def hold_inert_bias(self, adapter_name: str, held: bool) -> None:
        """Let the adapter have a bias delta here, to be set next, or none, if the bias is inert."""
        if self.has_inert_bias(adapter_name) and held != (adapter_name in self.fps_bias):
            if held:
                values = self.fps_values[adapter_name]
                blank = values.detach().new_full((self.neurons,), torch.nan)
                self.fps_bias[adapter_name] = nn.Parameter(blank, requires_grad=values.requires_grad)
            else:
                del self.fps_bias[adapter_name]

    def leave_out(self, adapter_name: str) -> None:
        """Let the adapter hold nothing here, neither entries nor a bias delta, until it gets a selection."""
        self.resize(adapter_name, 0)
        self.fps_row_counts[adapter_name] = torch.zeros_like(self.fps_row_counts[adapter_name])
        self._derived[adapter_name].checksum = None
        super().leave_out(adapter_name)

    def _resized(self, adapter_name: str, tensors: Mapping[str, Tensor | None]) -> bool | None:
        values, columns, bias = (tensors[name] for name in ("fps_values", "fps_columns", "fps_bias"))
        if values is None or columns is None or values.dim() != 1 or values.shape != columns.shape:
            return None
        self.resize(adapter_name, values.numel())
        self.hold_inert_bias(adapter_name, bias is not None)
        return values.numel() > 0 or bias is None or bias.numel() > 0

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove the adapter's tensors and everything derived from them."""
        super().delete_adapter(adapter_name)
        self._derived.pop(adapter_name, None)
        self._united.clear()

    # --- the weight, and the tensors --------------------------------------------------------------------------------

    def weight_rows(self, first: int, last: int) -> Tensor:
        """Return the rows `first:last` of the base weight seen as `(neurons, inputs)`, wherever it is kept."""
        with self.weight_at_hand():
            return self._matrix(first, last)

    def _matrix(self, first: int, last: int) -> Tensor:
        return self.layout.matrix(self.base_layer.weight.detach())[first:last]

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """Return the adapter's ΔW, times its scale, as a dense tensor in the shape and dtype of the base weight."""
        weight = self.base_layer.weight
        values = self.scaled(self.fps_values[adapter_name], adapter_name).to(weight.dtype)
        return dense_delta(values, self.structure(adapter_name), weight.shape)

    def _is_blank(self, adapter_name: str) -> bool:
        columns = self.fps_columns[adapter_name]
        if columns.numel():
            return not bool((columns != UNLOADED_COLUMN).any())
        return super()._is_blank(adapter_name)

    def _check_form(self, adapter_name: str) -> None:
        columns, row_counts = self.fps_columns[adapter_name], self.fps_row_counts[adapter_name]
        check_entries(columns, row_counts, self.shape.neurons, self.shape.inputs, self.fps_values[adapter_name])
        if (threshold := self.threshold(adapter_name)) is not None:
            check_floating("fps_threshold", threshold, torch.Size([1]))
            check_finite("fps_threshold", threshold)
        super()._check_form(adapter_name)

    def _merge_into(self, base: Any, name: str) -> MergeRecord:
        bias = self.bias_delta(name)
        delta = None if bias is None else self.scaled(bias.data, name)
        return merge_entries(base, self.structure(name), self.scaled(self.fps_values[name].data, name), delta)
