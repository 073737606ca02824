"""FPS layers over weights that no layer owns: all experts of a block in one tensor, projections of attention."""

from functools import partial
from typing import Any

from torch import Tensor

from peft_fps.base.packed_weight import PackedWeight
from peft_fps.layers.merge_record import unmerged_copy
from peft_fps.layers.sample_names import BASE, check_unmerged
from peft_fps.layers.sparse_product import ProductLayer
from peft_fps.selection import LayerShape
from peft_fps.sparse import Layout
from peft_fps.sparse.stand_ins import StandIn, changed_stand_in


class PackedLayer(ProductLayer):
    """A `PackedWeight` with sparse changes; its neurons are those of all matrices, one matrix after the other.

    A call gives the tensors that stand in for weight and biases where the module that owns them computes.
    """

    base_class = PackedWeight
    base_layer: PackedWeight

    def __init__(self, base_layer: PackedWeight, module_path: str) -> None:
        super().__init__(base_layer, module_path)
        self.matrices = base_layer.matrices

    @classmethod
    def shape_of(cls, base_layer: Any) -> LayerShape:
        """Return the number of neurons of all matrices, and their fan-in."""
        neurons, inputs = base_layer.sizes
        return LayerShape(base_layer.matrices * neurons, inputs)

    @classmethod
    def layout_of(cls, base_layer: Any) -> Layout:
        """Return how the matrices are stored: one after the other."""
        return Layout(base_layer.transposed, groups=base_layer.matrices, stacked=base_layer.weight.dim() == 3)

    @property
    def adds_its_change(self) -> bool:
        """Whether the change adds to the base layer's output."""
        return False

    def _matrix(self, first: int, last: int) -> Tensor:
        weight = self.base_layer.stacked.detach()
        each = self.shape.neurons // self.matrices
        start = first // each
        some = weight[start : -(-last // each)]
        rows = (some.transpose(1, 2) if self.layout.transposed else some).reshape(-1, self.shape.inputs)
        return rows[first - start * each : last - start * each]

    def _forward_with(self, names: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not names:
            return {}
        self._warn_before_training(names)
        structure, values = self.applied(names)
        base = self.base_layer
        weight, bias = base.stand_in_names
        changed = {weight: changed_stand_in(base.weight, values, structure)}
        if deltas := self._bias_deltas(names):
            changed[bias] = StandIn(partial(self._changed_bias, deltas))
        return changed

    def _unmerged_forward(self, x: Tensor) -> Any:
        base = unmerged_copy(self.base_layer, [self.merge_records[name] for name in reversed(self.merged_adapters)])
        tensors = dict(zip(base.stand_in_names, (base.weight, base.bias), strict=True))
        return {name: StandIn(partial(_same, tensor)) for name, tensor in tensors.items() if tensor is not None}

    def _mixed_forward(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Any:
        check_unmerged(self)
        names = {BASE if self.disable_adapters or not self.carries(name) else name for name in adapter_names}
        if len(names) > 1:
            raise ValueError(
                f"{self.module_path}: adapter_names holds adapters that change it and others "
                f"({sorted(set(adapter_names))}), expected one adapter for all samples, which it computes together. "
                "Run the samples of each adapter as a batch of their own."
            )
        return self._forward_with([name for name in names if name != BASE], x)


def _same(tensor: Tensor) -> Tensor:
    """Return the tensor itself; a `StandIn` takes a function that gives it."""
    return tensor
