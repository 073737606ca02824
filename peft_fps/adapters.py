"""What every FPS layer holds: per adapter the selected entries, their values and bias deltas, and merging."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from peft_fps.deriving import Derived, DerivingLayer
from peft_fps.merging import MergeRecord, is_finite, merge_entries, restore_entries
from peft_fps.scaling import ScaledLayer
from peft_fps.selection import LayerShape
from peft_fps.sparse import (
    Structure,
    StructureError,
    check_entries,
    check_finite,
    check_floating,
    dense_delta,
    even_row_counts,
)


UNLOADED_COLUMN = -1
"""Fills the columns of an adapter that was built from a saved config, until its tensors are loaded."""

Undone = tuple[str, MergeRecord, MergeRecord]
"""A merge that was undone: the adapter, its record, and what was overwritten."""


@dataclass
class AdapterState:
    """What all layers of one adapter share.

    Attributes:
        selected: its entries are those its config asks for: calibrated, loaded, or chosen by a score without data.
        warned: the warning about training without calibration was given.
        calibration: how they were chosen from data, None if they were not or that is unknown.
        base_fingerprint: of the base model, None where it could not be taken.
        saved_inputs: what the layers keep of their inputs for backward, see `FPSConfig`.
        unreached: paths of modules that no data has reached, which hold neither entries nor a bias delta.
        buffers: digests of the base model's buffers when the adapter was added, by name.
        before: an adapter file began to load; None once it has, and for an adapter that came from no file.
    """

    selected: bool = False
    warned: bool = False
    calibration: dict[str, Any] | None = None
    base_fingerprint: dict[str, str] | None = None
    saved_inputs: str = "rebuild"
    unreached: set[str] = field(default_factory=set)
    buffers: dict[str, str] = field(default_factory=dict)
    before: "Before | None" = None


@dataclass(frozen=True)
class Before:
    """What of a model PEFT changes by adding an adapter to it, as it was.

    Attributes:
        trainable: every parameter and whether it required grad.
        active: layers, modules that other adapters train whole, and what was active there.
        merged: layers and the adapters that were merged there.
    """

    trainable: list[tuple[nn.Parameter, bool]]
    active: list[tuple[Any, Any]]
    merged: list[tuple["FPSLayer", list[str]]]

    @classmethod
    def of(cls, model: nn.Module) -> "Before":
        """Note it down."""
        kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
        holders: list[Any] = [module for module in model.modules() if isinstance(module, kinds)]
        layers = [module for module in holders if isinstance(module, FPSLayer)]
        return cls(
            [(parameter, parameter.requires_grad) for parameter in model.parameters()],
            [(module, module._active_adapter) for module in holders],
            [(layer, list(layer.merged_adapters)) for layer in layers if layer.merged],
        )

    def restore(self) -> None:
        """Make it so again; adapters that were merged are merged with what they hold now."""
        for module, active in self.active:
            module._active_adapter = active
        for parameter, required in self.trainable:
            parameter.requires_grad_(required)
        for layer, names in self.merged:
            if not layer.merged:
                layer.merge(adapter_names=names)


class FPSLayer(ScaledLayer, DerivingLayer, BaseTunerLayer):
    """A frozen base layer with sparse changes.

    Attributes:
        module_path: path of the layer in the base model, for messages.
        shape: neurons, fan-in and whether there is a bias; the weight is seen as `(neurons, inputs)`.
        transposed: whether the weight is stored as `(inputs, neurons)`.
        fps_values: per adapter `(nnz,)`, ΔW at the selected entries.
        fps_bias: per adapter `(neurons,)`, bias delta; not with `bias="none"`, nor where the base layer has no bias.
        fps_columns: per adapter `(nnz,)` int32, strictly increasing within a neuron.
        fps_row_counts: per adapter `(neurons,)` int32, entries of each neuron.
        scaling: per adapter the scale of its changes, which is not saved.
    """

    base_layer: Any
    adapter_layer_names: tuple[str, ...] = ("fps_values", "fps_bias")
    other_param_names: tuple[str, ...] = ("fps_columns", "fps_row_counts", "fps_state", "scaling")
    cast_input_dtype_enabled = True
    transposed = False

    def _setup(self, base_layer: Any, module_path: str, shape: LayerShape) -> None:
        self.base_layer = base_layer
        self.module_path = module_path
        self.shape = shape
        self.fps_values = nn.ParameterDict({})
        self.fps_bias = nn.ParameterDict({})
        self.fps_columns = BufferDict(persistent=True)
        self.fps_row_counts = BufferDict(persistent=True)
        self.fps_state: dict[str, AdapterState] = {}
        self.scaling: dict[str, float] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.merge_records: dict[str, MergeRecord] = {}
        self._derived = {}
        self._united = {}

    def update_layer(
        self, adapter_name: str, entries: int, bias: bool, state: AdapterState, inference_mode: bool = False
    ) -> None:
        """Add an adapter with room for `entries` entries that are still to be selected or loaded.

        Until then columns and values hold what no valid adapter holds, so that a load that skips a tensor is noticed.
        """
        device, dtype, neurons = self._adapter_device(), self._values_dtype(), self.shape.neurons
        self.fps_values[adapter_name] = nn.Parameter(torch.full((entries,), torch.nan, dtype=dtype, device=device))
        if bias and self.shape.bias:
            self.fps_bias[adapter_name] = nn.Parameter(torch.full((neurons,), torch.nan, dtype=dtype, device=device))
        self.fps_columns[adapter_name] = torch.full((entries,), UNLOADED_COLUMN, dtype=torch.int32, device=device)
        self.fps_row_counts[adapter_name] = even_row_counts(entries, neurons).to(device)
        self.fps_state[adapter_name] = state
        self.scaling[adapter_name] = 1.0
        self._derived[adapter_name] = Derived()
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def set_selection(self, adapter_name: str, columns: Tensor, row_counts: Tensor) -> None:
        """Give the adapter new entries, `columns` `(nnz,)` and `row_counts` `(neurons,)`, and zero changes.

        The parameters stay the same objects, since an optimizer may hold them already.
        """
        columns, row_counts = check_entries(columns, row_counts, self.shape.neurons, self.shape.inputs)
        self.resize(adapter_name, columns.numel())
        self.resize_bias(adapter_name, self.shape.neurons)
        self.fps_state[adapter_name].unreached.discard(self.module_path)
        device = self.fps_columns[adapter_name].device
        self.fps_columns[adapter_name] = columns.to(device, torch.int32)
        self.fps_row_counts[adapter_name] = row_counts.to(device, torch.int32)
        for parameter in self.adapter_parameters(adapter_name):
            parameter.data.zero_()
            parameter.grad = None
        if self._derived[adapter_name].known is not None:  # else the first use derives it
            self.renew(adapter_name)

    def resize(self, adapter_name: str, entries: int) -> None:
        """Make room for another number of entries, whose columns and values are to be set next."""
        values = self.fps_values[adapter_name]
        if values.numel() != entries:
            values.data = values.data.new_full((entries,), torch.nan)
            values.grad = None
            self.fps_columns[adapter_name] = self.fps_columns[adapter_name].new_full((entries,), UNLOADED_COLUMN)

    def resize_bias(self, adapter_name: str, neurons: int) -> None:
        """Make room for a bias delta of another size, to be set next, if the adapter has one here."""
        bias = self.fps_bias.get(adapter_name)
        if bias is not None and bias.numel() != neurons:
            bias.data = bias.data.new_full((neurons,), torch.nan)
            bias.grad = None

    def leave_out(self, adapter_name: str) -> None:
        """Let the adapter hold nothing here, neither entries nor a bias delta, until it gets a selection."""
        self.resize(adapter_name, 0)
        self.resize_bias(adapter_name, 0)
        self.fps_row_counts[adapter_name] = torch.zeros_like(self.fps_row_counts[adapter_name])
        self.fps_state[adapter_name].unreached.add(self.module_path)

    def make_room(self, state_dict: Mapping[str, Tensor], prefix: str) -> None:
        """Take over the sizes that each adapter has in a state dict; what does not fit is left for torch to refuse.

        Args:
            state_dict: about to be loaded.
            prefix: of this layer's keys in it.
        """
        for name, state in self.fps_state.items():
            keys = (f"{prefix}{held}.{name}" for held in ("fps_values", "fps_columns", "fps_bias"))
            values, columns, bias = (state_dict.get(key) for key in keys)
            if values is None or columns is None or values.dim() != 1 or values.shape != columns.shape:
                continue
            self.resize(name, values.numel())
            state.selected = True
            reached = values.numel() > 0 or bias is None or bias.numel() > 0
            self.resize_bias(name, self.shape.neurons if reached else 0)
            (state.unreached.discard if reached else state.unreached.add)(self.module_path)

    def carries(self, adapter_name: str) -> bool:
        """Whether the adapter holds something here: it targets the layer, and data has reached it."""
        return adapter_name in self.fps_values and self.module_path not in self.fps_state[adapter_name].unreached

    def bias_delta(self, adapter_name: str) -> nn.Parameter | None:
        """The adapter's bias delta `(neurons,)`, None where it has none."""
        return self.fps_bias[adapter_name] if adapter_name in self.fps_bias and self.carries(adapter_name) else None

    @property
    def weight_tensor(self) -> Tensor:
        """The tensor that stores the base weight."""
        return self.base_layer.weight

    def weight_rows(self, first: int, last: int) -> Tensor:
        """Return the rows `first:last` of the base weight seen as `(neurons, inputs)`."""
        weight = self.base_layer.weight.detach()
        return (weight.t() if self.transposed else weight.flatten(1))[first:last]

    def _values_dtype(self) -> torch.dtype:
        return self.base_layer.weight.dtype

    def adapter_parameters(self, adapter_name: str) -> list[nn.Parameter]:
        """The adapter's values and, if it has one, its bias delta."""
        return [held[adapter_name] for held in (self.fps_values, self.fps_bias) if adapter_name in held]

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove the adapter's tensors and everything derived from them."""
        super().delete_adapter(adapter_name)
        self._derived.pop(adapter_name, None)
        self._united.clear()

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """Return the adapter's ΔW, times its scale, as a dense tensor in the shape and dtype of the base weight."""
        weight = self.base_layer.weight
        values = self.scaled(self.fps_values[adapter_name], adapter_name).to(weight.dtype)
        return dense_delta(values, self.structure(adapter_name), weight.shape)

    def awaits_loading(self, adapter_name: str) -> bool:
        """Whether the adapter was built from a saved config and its tensors were neither loaded nor selected."""
        columns = self.fps_columns[adapter_name]
        if any(tensor.device.type == "meta" for tensor in (columns, *self.adapter_parameters(adapter_name))):
            return True
        if not self.carries(adapter_name):
            return False
        if columns.numel():
            return not bool((columns != UNLOADED_COLUMN).any())
        bias = self.fps_bias.get(adapter_name)
        return bias is not None and bool(bias.detach().isnan().all())

    def check_tensors(self, adapter_name: str) -> None:
        """Raise ValueError unless the adapter's tensors are loaded, well-formed and finite."""
        where = f"{self.module_path}: adapter {adapter_name!r}"
        columns, values = self.fps_columns[adapter_name], self.fps_values[adapter_name]
        if any(parameter.device.type == "meta" for parameter in self.adapter_parameters(adapter_name)):
            raise ValueError(
                f"{where} has its values on the meta device, expected loaded tensors. Load an adapter file, or build "
                "the adapter without low_cpu_mem_usage."
            )
        if self.awaits_loading(adapter_name):
            raise ValueError(
                f"{where} was built from a saved config, and its fps_columns were not loaded. Load an adapter file "
                "that holds them, select entries with model.calibrate(...), or start from an FPSConfig whose "
                "allocation is None."
            )
        try:
            check_entries(columns, self.fps_row_counts[adapter_name], self.shape.neurons, self.shape.inputs, values)
            if (bias := self.bias_delta(adapter_name)) is not None:
                check_floating("fps_bias", bias, torch.Size([self.shape.neurons]))
                check_finite("fps_bias", bias)
        except StructureError as error:
            raise ValueError(
                f"{where}: {error}. Its tensors are damaged or incomplete; load an intact file."
            ) from error

    def applied(self, names: list[str]) -> tuple[Structure, Tensor]:
        """Return structure and values `(nnz,)` of the sum of the named adapters, each times its scale."""
        if len(names) == 1:
            values = self.fps_values[names[0]]
            return self.structure(names[0]), values if self.scaling[names[0]] == 1 else self.scaled(values, names[0])
        united, places = self.united_structure(names)
        scaled = [self.scaled(self.fps_values[name], name) for name in names]
        values = torch.cat([part.to(torch.promote_types(part.dtype, torch.float32)) for part in scaled])
        return united, values.new_zeros(united.positions.numel()).index_add(0, places, values)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' changes to the base layer in place, and keep the originals of the entries they touch.

        If anything is raised, nothing is changed.

        Args:
            safe_merge: refuse a merge that would write NaN or infinity.
            adapter_names: adapters to merge, in order; the active ones if None.

        Raises:
            ValueError: a name is there twice, the weight is not at hand, or, with `safe_merge`, the merged weights
                would not be finite.
        """
        if adapter_names is not None and not adapter_names:
            return
        check_distinct(adapter_names or ())
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.fps_values]
        if names:
            self._check_at_hand("merge into")
        for name in names if safe_merge else ():
            self.check_finite(name)
        before = len(self.merged_adapters)
        try:
            for name in names:
                self.merge_records[name] = self._merge_into(self.base_layer, name)
                self.merged_adapters.append(name)
                if safe_merge and not is_finite(self.base_layer, self.merge_records[name]):
                    raise self._not_finite(name)
        except BaseException:
            self.take_out(len(self.merged_adapters) - before)
            raise

    def _merge_into(self, base: Any, name: str) -> MergeRecord:
        """Add the adapter's changes, times its scale, to a base layer in place."""
        bias = self.bias_delta(name)
        delta = None if bias is None else self.scaled(bias.data, name)
        return merge_entries(base, self.structure(name), self.scaled(self.fps_values[name].data, name), delta)

    def check_finite(self, adapter_name: str) -> None:
        """Raise ValueError if the adapter's values or bias deltas hold NaN or infinity."""
        parameters = self.adapter_parameters(adapter_name)
        if not all(bool(torch.isfinite(parameter.detach()).all()) for parameter in parameters):
            raise self._not_finite(adapter_name)

    def _not_finite(self, adapter_name: str) -> ValueError:
        return ValueError(
            f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken: {self.module_path} "
            "would hold NaN or infinity, expected finite weights. Nothing was merged; load an intact adapter."
        )

    def unmerge(self) -> None:
        """Put the originals back, bit for bit, latest merge first. If anything is raised, nothing is changed."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        self.take_out(len(self.merged_adapters))

    def take_out(self, count: int) -> list[Undone]:
        """Undo the latest `count` merges, all or none.

        Returns:
            The merges that were undone, in that order, for `put_back`.
        """
        undone: list[Undone] = []
        try:
            for name in self.merged_adapters[: -count - 1 : -1] if count else ():
                self._check_at_hand("unmerge")
                record = self.merge_records[name]
                undone.append((name, record, restore_entries(self.base_layer, record)))
                self.merged_adapters.pop()
                del self.merge_records[name]
        except BaseException:
            self.put_back(undone)
            raise
        return undone

    def put_back(self, undone: list[Undone]) -> None:
        """Do again what `take_out` has undone, bit for bit. What the adapters hold by now does not matter."""
        for name, record, merged in reversed(undone):
            restore_entries(self.base_layer, merged)
            self.merge_records[name] = record
            self.merged_adapters.append(name)

    def _check_at_hand(self, verb: str) -> None:
        """Raise ValueError if the base weight is on the meta device, where nothing that is written stays."""
        if self.weight_tensor.device.type == "meta":
            raise ValueError(
                f"{self.module_path}: its weight is on the meta device, expected a weight at hand to {verb}. Load the "
                "base model's weights first, or let the whole model do it (model.merge_adapter() and "
                "model.unmerge_adapter() bring weights that accelerate offloads). Nothing was changed."
            )

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters, as PEFT does.

        Raises:
            ValueError: a name is there twice, so that its changes would count twice.
        """
        check_distinct(adapter_names)
        super().set_adapter(adapter_names, inference_mode=inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's version also casts values to the base layer's dtype, which would lose digits that were just loaded
        if adapter_name not in self.fps_values:
            return
        device = device or self._adapter_device()
        for parameter in self.adapter_parameters(adapter_name):
            if parameter.device.type != "meta":
                parameter.data = parameter.data.to(device)
        for buffers in (self.fps_columns, self.fps_row_counts):
            if buffers[adapter_name].device.type != "meta":
                buffers[adapter_name] = buffers[adapter_name].to(device)

    def _adapter_device(self) -> torch.device:
        """The weight's device, or where accelerate will bring a weight that it offloads."""
        device = self.weight_tensor.device
        if device.type != "meta":
            return device
        for hook in _single_hooks(getattr(self.base_layer, "_hf_hook", None)):
            if getattr(hook, "offload", False):
                return torch.device("cpu" if hook.execution_device is None else hook.execution_device)
        return device


def check_distinct(names: str | Iterable[str]) -> None:
    """Raise ValueError if a name is there twice."""
    listed = [names] if isinstance(names, str) else list(names)
    if twice := sorted({name for name in listed if listed.count(name) > 1}):
        raise ValueError(
            f"The adapters {listed} hold {', '.join(map(repr, twice))} more than once, expected each name once. To "
            "let an adapter count more, scale it with model.set_scale. Nothing was changed."
        )


def _single_hooks(hook: Any) -> Iterator[Any]:
    """Yield an accelerate hook, or those that a `SequentialHook` (of others of its kind, perhaps) is made of."""
    for part in getattr(hook, "hooks", ()):
        yield from _single_hooks(part)
    if not hasattr(hook, "hooks"):
        yield hook
