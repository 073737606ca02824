"""The base class of FPS layers: a frozen base layer, and adapters that change its bias. Subclasses change more."""

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from peft_fps.layers.adapter_state import AdapterState
from peft_fps.layers.layer_merge import MergingLayer, check_distinct, warn_of_loss
from peft_fps.layers.merge_record import MergeRecord, unmerged_copy
from peft_fps.layers.sample_names import BASE, by_adapter, check_samples, named_calls, names_for
from peft_fps.layers.scale import ScaledLayer
from peft_fps.layers.tensor_checks import CheckedLayer, renew_after_loading
from peft_fps.selection.module_sizes import ModuleSizes


class FPSLayer(nn.Module, ScaledLayer, CheckedLayer, MergingLayer):
    """A frozen base layer with adapters.

    There are two kinds. A `Norm` has bias deltas alone. An `EntryLayer` has sparse changes of its weight besides.

    Attributes:
        base_class: the kind of base layer.
        base_layer: the frozen layer.
        module_path: path of the layer in the base model, for messages.
        neurons: number of elements of a bias delta.
        fps_bias: per adapter `(neurons,)`, bias delta; not with `bias="none"`, nor where the base layer has no bias or
            an inert one, see `AdapterState`.
        fps_state: per adapter what its layers share. The adapters of this layer are those named here.
        scaling: per adapter the scale of its changes, which is not saved.
    """

    base_class: type[nn.Module]
    adapter_layer_names: tuple[str, ...] = ("fps_bias",)
    other_param_names: tuple[str, ...] = ("fps_state", "scaling")
    cast_input_dtype_enabled = True

    def __init__(self, base_layer: Any, module_path: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.module_path = module_path
        self.neurons = self.neurons_of(base_layer)
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict({}))
        for name in self.index_names:
            setattr(self, name, BufferDict(persistent=True))
        self.fps_threshold = None
        self.fps_state: dict[str, AdapterState] = {}
        self.scaling: dict[str, float] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.merge_records: dict[str, MergeRecord] = {}
        self.register_load_state_dict_post_hook(renew_after_loading)
        self.register_load_state_dict_post_hook(warn_of_loss)

    @classmethod
    def neurons_of(cls, base_layer: Any) -> int:
        """Return the number of elements that a bias of the base layer has."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        """Return a submodule, or what the base layer has under a public name: models read it off their layers."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("base_layer")
            # private names are how libraries mark the modules they have changed, each its own
            if base is None or name.startswith("_") or not hasattr(base, name):
                raise
        return getattr(base, name)

    # --- forward ----------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """Run the base layer with the changes of the active adapters, or of another one for each sample.

        Args:
            x: what the base layer takes: `(..., inputs)` for a linear layer, `(batch, channels, *size)` for a
                convolution, `(...)` integers for an embedding, `(..., *normalized_shape)` for a norm.
            args: further arguments of the base layer's forward, as are `kwargs`: a transposed convolution's
                `output_size`.
            adapter_names: one per sample; those of the call of the model if None, see `mixed_batch`.

        Returns:
            What the base layer returns, in its shape and dtype.
        """
        if adapter_names is None and named_calls.running:
            adapter_names = names_for(self)
        if adapter_names is not None:
            return self._mixed_forward(x, adapter_names, *args, **kwargs)
        if self.disable_adapters or self.merged:
            if self.disable_adapters and self.merged:
                return self._unmerged_forward(x, *args, **kwargs)
            return self._forward_with([], x, *args, **kwargs)
        names = [name for name in self.active_adapters if self.carries(name)]
        return self._forward_with(names, x, *args, **kwargs)

    def _forward_with(self, names: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the base layer as it is now, with the changes of the named adapters."""
        raise NotImplementedError

    def _mixed_forward(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        check_samples(self, x, adapter_names)
        carried = set() if self.disable_adapters else {name for name in adapter_names if self.carries(name)}
        names = [name if name in carried else BASE for name in adapter_names]
        return by_adapter(
            lambda name, part: self._forward_with([] if name == BASE else [name], part, *args, **kwargs), x, names
        )

    def _unmerged_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output although adapters are merged into it; writes nothing."""
        result: Tensor = self._unmerged()(x, *args, **kwargs)
        return result

    def _unmerged(self) -> Any:
        """Return a copy of the base layer as it was before adapters were merged into it."""
        self._check_kept("Nothing was computed.")
        return unmerged_copy(self.base_layer, [self.merge_records[name] for name in reversed(self.merged_adapters)])

    def _bias_deltas(self, names: list[str]) -> list[Tensor]:
        """Return the bias deltas `(neurons,)` of those named adapters that have one, each times its scale."""
        return [
            self.fps_bias[name] if self.scaling[name] == 1 else self.scaled(self.fps_bias[name], name)
            for name in names
            if name in self.fps_bias
        ]

    def _is_bare(self, base: Any) -> bool:
        """Whether calling the base layer runs its class's forward and nothing else: no hooks, no forward over it."""
        hooked = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
        return "forward" not in vars(base) and not hooked

    def carries(self, adapter_name: str) -> bool:
        """Return whether the adapter holds something here. It targets the layer then, and data has reached it."""
        state = self.fps_state.get(adapter_name)
        return state is not None and self.module_path not in state.unreached

    def has_inert_bias(self, adapter_name: str) -> bool:
        """Return whether the bias does not change the output, so that the adapter needs no bias delta here."""
        return self.module_path in self.fps_state[adapter_name].inert_biases

    # --- an adapter's tensors ---------------------------------------------------------------------------------------

    def tensor_names(self) -> tuple[str, ...]:
        """Return the names of the attributes that hold an adapter's tensors."""
        return (*self.adapter_layer_names, *self.index_names)

    def sizes(self, adapter_name: str) -> ModuleSizes:
        """Return how large the adapter's part of this layer is, as a saved config records it."""
        raise NotImplementedError

    # --- an adapter's life ------------------------------------------------------------------------------------------

    def update_layer(
        self, adapter_name: str, entries: int, bias: bool, state: AdapterState, inference_mode: bool = False
    ) -> None:
        """Add an adapter. Until something is selected or loaded, its tensors hold what no valid adapter holds.

        Args:
            adapter_name: name of the adapter.
            entries: how many entries it is to have; 0 for a kind without entries.
            bias: whether it trains biases.
            state: what all its layers share.
            inference_mode: whether it is not to be trained.
        """
        if bias and getattr(self.base_layer, "bias", None) is not None and self.module_path not in state.inert_biases:
            blank = torch.full((self.neurons,), torch.nan, dtype=self._values_dtype(), device=self._adapter_device())
            self.fps_bias[adapter_name] = nn.Parameter(blank)
        self.fps_state[adapter_name] = state
        self.scaling[adapter_name] = 1.0
        self.forget(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _values_dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.base_layer.weight.dtype
        return dtype

    def start_from_zero(self, adapter_name: str) -> None:
        """Let the adapter hold something here, with zero changes.

        The parameters stay the same objects, since an optimizer may hold them already.
        """
        self.resize_bias(adapter_name, self.neurons)
        self.fps_state[adapter_name].unreached.discard(self.module_path)
        for parameter in self.adapter_parameters(adapter_name):
            parameter.data.zero_()
            parameter.grad = None

    def resize_bias(self, adapter_name: str, neurons: int) -> None:
        """Make room for a bias delta of another size, to be set next, if the adapter has one here."""
        bias = self.fps_bias.get(adapter_name)
        if bias is not None and bias.numel() != neurons:
            bias.data = bias.data.new_full((neurons,), torch.nan)
            bias.grad = None

    def leave_out(self, adapter_name: str) -> None:
        """Let the adapter hold nothing here until it starts from zero or is loaded."""
        self.resize_bias(adapter_name, 0)
        self.fps_state[adapter_name].unreached.add(self.module_path)

    def make_room(self, state_dict: Mapping[str, Tensor], prefix: str) -> None:
        """Take over the sizes that each adapter has in a state dict; what does not fit is left for torch to refuse.

        Args:
            state_dict: about to be loaded.
            prefix: of this layer's keys in it.
        """
        for name, state in self.fps_state.items():
            sizes = {held: state_dict.get(f"{prefix}{held}.{name}") for held in self.tensor_names()}
            reached = self._resized(name, sizes)
            if reached is not None:
                state.selected = True
                self.resize_bias(name, self.neurons if reached else 0)
                (state.unreached.discard if reached else state.unreached.add)(self.module_path)

    def _resized(self, adapter_name: str, tensors: Mapping[str, Tensor | None]) -> bool | None:
        """Resize a subclass's tensors, and return whether data had reached the layer; None if tensors are missing."""
        raise NotImplementedError

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.make_room(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove the adapter's tensors and everything that is known of them."""
        super().delete_adapter(adapter_name)
        self.forget(adapter_name)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters, as PEFT does.

        Raises:
            ValueError: a name is there twice, so that its changes would count twice.
        """
        check_distinct(adapter_names)
        super().set_adapter(adapter_names, inference_mode=inference_mode)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """Return the adapter's ΔW, times its scale, as a dense tensor in the shape of the base weight."""
        raise NotImplementedError
