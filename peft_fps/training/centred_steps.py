"""Optimizer steps that train entries as if their inputs had the mean 0.

An entry of weight w and input a adds w · a to its neuron's output, on average w · E[a]. For the large inputs that FPS
selects this is above all one shift, the same for all examples, which a bias can make as well. A centred step trains
w · (a - E[a]) + b' with b' = b + w · E[a]: the entry learns what differs between examples, and the bias alone shifts
them. Both are the same model, so after every step b is b' - w · E[a] again, and the adapter is an ordinary one.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from peft_fps.layers.entry_layer import EntryLayer
from peft_fps.sparse import Structure


@dataclass
class CentredLayer:
    """Entries of a layer with bias deltas.

    Attributes:
        layer: the layer.
        adapter_name: name of the adapter.
        structure: where the entries lie.
        means: `(nnz,)`, E[a] of each entry's input, in the dtype of the values.
    """

    layer: EntryLayer
    adapter_name: str
    structure: Structure
    means: Tensor

    @property
    def values(self) -> nn.Parameter:
        """`(nnz,)`, w."""
        return self.layer.fps_values[self.adapter_name]

    @property
    def bias(self) -> nn.Parameter:
        """`(neurons,)`, b."""
        return self.layer.fps_bias[self.adapter_name]

    def check(self) -> None:
        """Raise ValueError if the layer has got other entries, to which the means do not belong."""
        structure = self.layer.structure(self.adapter_name)
        if structure is not self.structure and not torch.equal(structure.positions, self.structure.positions):
            raise ValueError(
                f"{self.layer.module_path}: adapter {self.adapter_name!r} has other entries, expected those that it "
                "had when steps were centred. After calibration call remove() and centre_steps again."
            )
        self.structure = structure


class CentredSteps:
    """Hooks of an optimizer; `centre_steps` makes them.

    Attributes:
        layers: what is centred, by path in the base model.
        left_out: reasons by path of the layers whose entries are trained as they are.
        of_callback: whether an `FPSCallback` has made them, whose next training removes them if this one fails.
    """

    of_callback = False

    def __init__(
        self, optimizer: torch.optim.Optimizer, layers: Mapping[str, CentredLayer], left_out: Mapping[str, str]
    ) -> None:
        self.layers, self.left_out = layers, left_out
        self._before: dict[str, Tensor] = {}
        self._handles = [
            optimizer.register_step_pre_hook(self._centre_gradients),
            optimizer.register_step_post_hook(self._shift_biases),
        ]
        _CENTRED.setdefault(optimizer, []).append(self)

    def __str__(self) -> str:
        reasons = Counter(self.left_out.values())
        rest = "".join(f"; {count} not ({reason})" for reason, count in sorted(reasons.items()))
        return f"{len(self.layers)} layers are trained with centred inputs{rest}"

    def remove(self) -> None:
        """Let the optimizer step as it did before."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for steps in _CENTRED.values():
            if self in steps:
                steps.remove(self)

    def centres(self, layer: EntryLayer, adapter_name: str) -> bool:
        """Whether they centre the adapter's entries in a layer."""
        own = ((each.layer, each.adapter_name) for each in self.layers.values())
        return any(each is layer and name == adapter_name for each, name in own)

    @torch.no_grad()
    def _centre_gradients(self, optimizer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Turn the gradient of w at constant b into that at constant b'."""
        if any(each is not None for each in (*args[1:2], kwargs.get("closure"))):
            raise ValueError(
                f"{type(optimizer).__name__}.step got a closure, which computes gradients anew, expected none. "
                "Remove the centring with CentredSteps.remove()."
            )
        self._before.clear()
        for path, layer in self.layers.items():
            values, gradient, shift = layer.values, layer.values.grad, layer.bias.grad
            if gradient is not None and shift is not None:
                layer.check()
                self._before[path] = values.detach().clone()
                gradient -= centring(shift, layer.structure.rows, layer.means).to(gradient.dtype)

    @torch.no_grad()
    def _shift_biases(self, *_: Any) -> None:
        """Move b so that b' stays where the step has put it."""
        for path, before in self._before.items():
            layer = self.layers[path]
            moved = (before - layer.values) * layer.means
            layer.bias.index_add_(0, layer.structure.rows, moved.to(layer.bias.dtype))
        self._before.clear()


_CENTRED: WeakKeyDictionary[torch.optim.Optimizer, list[CentredSteps]] = WeakKeyDictionary()


def steps_of(optimizer: torch.optim.Optimizer) -> list[CentredSteps]:
    """Return the hooks that centre the optimizer's steps now."""
    return list(_CENTRED.get(optimizer, ()))


def is_centred(optimizer: torch.optim.Optimizer, layer: EntryLayer, adapter_name: str) -> bool:
    """Whether the optimizer's steps centre an adapter's entries in a layer already.

    Args:
        optimizer: of torch.
        layer: has the adapter.
        adapter_name: name of the adapter.
    """
    return any(steps.centres(layer, adapter_name) for steps in steps_of(optimizer))


def centring(bias_gradient: Tensor, rows: Tensor, means: Tensor) -> Tensor:
    """Return E[a] · ∂L/∂b of every entry, by which its gradient at constant b exceeds that at constant b'.

    Args:
        bias_gradient: `(neurons,)`.
        rows: `(nnz,)` integers, the neuron of each entry.
        means: `(nnz,)`, E[a] of its input.

    Returns:
        `(nnz,)`.
    """
    return means * bias_gradient.index_select(0, rows)
