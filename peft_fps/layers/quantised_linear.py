"""The tuner layer of quantised linear layers: the base runs as it is, and the sparse product is added to it."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft.utils.quantization_utils import TorchaoBackend, get_quantization_kwargs
from torch import Tensor, nn

from peft_fps.base.quantisation import dense_weight, held_by, put, quantisation, requantised, stored_weight
from peft_fps.layers.entry_layer import EntryLayer
from peft_fps.layers.fps_layer import FPSLayer
from peft_fps.layers.merge_record import MergeRecord, add_to_bias
from peft_fps.layers.sparse_product import ProductLayer
from peft_fps.selection import LayerShape
from peft_fps.sparse import dense_delta, merged_entries


class QuantisedLinear(ProductLayer):
    """A linear layer with a quantised weight and sparse changes, `y = base(x) + x ΔWᵀ + Δb`.

    Changes are float32 parameters and are multiplied in float32 (in autocast's dtype under autocast), so they are as
    exact as with a float32 weight. The weight is never dequantised in a forward. Merging dequantises, adds and
    quantises again; the merge record keeps the quantised weight from before, so that unmerging restores it bit for
    bit. That costs its memory once more for every merged adapter.

    Attributes:
        quantization_backend: PEFT's, which reads and writes the weight.
    """

    writes_in_place = False

    quantization_backend: Any

    def __init__(self, base_layer: Any, module_path: str) -> None:
        super().__init__(base_layer, module_path)
        kind = quantisation(base_layer)
        assert kind is not None
        self.quantization_backend = kind.make_backend()
        self._dense: tuple[int, Tensor] | None = None  # the next row to be read, while rows are read in order

    @classmethod
    def shape_of(cls, base_layer: Any) -> LayerShape:
        """Return the shape of the weight seen as `(neurons, inputs)`; 4-bit weights are packed in another one."""
        return LayerShape(base_layer.out_features, base_layer.in_features)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_dense": None}

    def _owns_forward(self, base: Any) -> bool:
        return False

    # --- reading --------------------------------------------------------------------------------------------------

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, packed: a model that reads it off the layer is to know how it is quantised."""
        weight: Tensor = self.base_layer.weight
        return weight

    @property
    def weight_tensor(self) -> Tensor:
        """The tensor that stores the base weight, packed."""
        return stored_weight(self.base_layer)

    def _values_dtype(self) -> torch.dtype:
        return torch.float32

    def _matrix(self, first: int, last: int) -> Tensor:
        """Return the rows `first:last` of the weight, dequantised once for rows that are read in order.

        The dense weight is let go with its last row.
        """
        known = self._dense
        dense = dense_weight(self.base_layer) if known is None or known[0] != first or first == 0 else known[1]
        self._dense = None if last >= self.shape.neurons else (last, dense)
        return dense[first:last]

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """Return the adapter's ΔW, times its scale, as a dense tensor `(neurons, inputs)` in the values' dtype."""
        values = self.scaled(self.fps_values[adapter_name], adapter_name)
        shape = torch.Size([self.shape.neurons, self.shape.inputs])
        return dense_delta(values, self.structure(adapter_name), shape)

    # --- merging --------------------------------------------------------------------------------------------------

    def check_writable(self) -> None:
        """Raise ValueError if the weight cannot be quantised again after a merge."""
        backend = self.quantization_backend
        if not isinstance(backend, TorchaoBackend):
            return
        configure: Any = backend.get_apply_tensor_subclass
        by_name = configure is not None and type(configure()).__name__ in ("FqnToConfig", "ModuleFqnToConfig")
        if configure is None or by_name:
            found = "has a torchao configuration by module name" if by_name else "was quantised with unknown settings"
            raise ValueError(
                f"{self.module_path}: its weight {found}, expected a model that transformers quantised with one "
                "TorchAoConfig, which says how to quantise the merged weight again. Keep the adapter unmerged, or "
                "merge it into the unquantised model and quantise that. Nothing was merged."
            )

    @torch.no_grad()
    def _merge_into(self, base: Any, name: str) -> MergeRecord:
        self.check_writable()
        structure, values = self.structure(name), self.scaled(self.fps_values[name].data, name)
        bias = self.bias_delta(name)
        delta = None if bias is None else self.scaled(bias.data, name)
        positions = structure.positions.to(torch.int64)
        dense = dense_weight(base, self.quantization_backend).contiguous()
        before, after = merged_entries(dense, values, positions)
        dense.view(-1).index_copy_(0, positions, after)
        held = held_by(base)
        try:
            put(base, requantised(base, dense, self.quantization_backend))
            stored = dense_weight(base, self.quantization_backend).contiguous().view(-1)[positions]
            # a scale that moves with the merge lets every entry move a little, so what counts is most of the change
            lost = ((stored.float() - before.float()).abs() < values.abs() / 2) & (values != 0)
            original, written, changes_of_bias, lost_of_bias = add_to_bias(base, delta)
        except BaseException:
            put(base, held)
            raise
        changes = int((values != 0).sum()) + changes_of_bias
        lost_in_all = int(lost.sum()) + lost_of_bias
        return MergeRecord(positions, before[:0], stored, original, written, changes, lost_in_all, held)

    def _check_kept(self, outcome: str) -> None:
        if not self.merged_adapters:
            return
        record = self.merge_records[self.merged_adapters[-1]]
        dense = dense_weight(self.base_layer).reshape(-1)
        now = dense[record.positions.to(dense.device)].float()
        if not torch.allclose(now, record.written.to(now), rtol=1e-3, atol=1e-6, equal_nan=True):
            raise ValueError(
                f"{self.module_path}: its quantised weight is not the one that merging {self.merged_adapters[-1]!r} "
                "has made, expected the same: putting back the weight from before would lose what has changed it "
                "since (another adapter's merge, as of a LoRA adapter around this layer). Load the base model "
                f"anew, and keep one of the adapters unmerged. {outcome}"
            )


def check_writable(model: nn.Module, layers: Iterable[FPSLayer]) -> None:
    """Raise ValueError unless the weights of all quantised layers can be written back after a merge.

    Args:
        model: of the layers; transformers keeps in it how torchao has quantised it.
        layers: to be merged.
    """
    quantised = [layer for layer in layers if isinstance(layer, QuantisedLinear)]
    for layer in quantised:
        backend = layer.quantization_backend
        if isinstance(backend, TorchaoBackend):
            known = next((found for module in model.modules() if (found := get_quantization_kwargs(module))), {})
            backend.get_apply_tensor_subclass = known.get("get_apply_tensor_subclass")
        layer.check_writable()


def check_gradients(layers: Mapping[str, EntryLayer], importance: str) -> None:
    """Raise ValueError if one of the weights is quantised, so that it gets no gradient.

    Args:
        layers: to be scored, by module path.
        importance: what needs gradients, for the message.
    """
    for path, layer in layers.items():
        if isinstance(layer, QuantisedLinear):
            raise ValueError(
                f"{path}: its weight is quantised ({layer.quantization_backend.backend_name}), expected one that gets "
                f"gradients, since importance={importance!r} needs a backward pass. Choose importance='activation', "
                "'magnitude' or 'random', or select on the unquantised model and hand the entries over "
                "(Selection.of, apply). Nothing was changed."
            )
