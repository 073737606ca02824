"""Optimizer steps that train entries as if their inputs had the mean 0.

An entry of weight w and input a adds w · a to its neuron's output, on average w · E[a]. For the large inputs that FPS
selects this is above all one shift, the same for all examples, which a bias can make as well. A centred step trains
w · (a - E[a]) + b' with b' = b + w · E[a]: the entry learns what differs between examples, and the bias alone shifts
them. Both are the same model, so after every step b is b' - w · E[a] again, and the adapter is an ordinary one.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft_fps.base.sharded import is_partitioned, is_sharded
from peft_fps.calibration import Pass, Run
from peft_fps.layers.entry_layer import EntryLayer
from peft_fps.layers.lookup import active_adapter, adapter_layers, entry_layers
from peft_fps.lifecycle.input_means import input_means


NUM_BATCHES = 20
"""Batches that the means are taken over by default."""


@dataclass(frozen=True)
class CentredLayer:
    """Entries of a layer with bias deltas.

    Attributes:
        path: of the layer in the base model.
        values: `(nnz,)`, w.
        bias: `(neurons,)`, b.
        rows: `(nnz,)` int32, the neuron of each entry.
        means: `(nnz,)`, E[a] of each entry's input.
    """

    path: str
    values: nn.Parameter
    bias: nn.Parameter
    rows: Tensor
    means: Tensor

    @property
    def is_trained(self) -> bool:
        """Whether the next step changes both kinds of numbers."""
        return self.values.grad is not None and self.bias.grad is not None

    def check(self) -> None:
        """Raise ValueError if the layer has got other entries."""
        if self.values.shape != self.means.shape:
            raise ValueError(
                f"{self.path}: it has {self.values.numel()} entries, expected the {self.means.numel()} that it had "
                "when steps were centred. Call centre_steps after calibration, and again after each."
            )


class CentredSteps:
    """Hooks of an optimizer; `centre_steps` makes them.

    Attributes:
        layers: what is centred.
        left_out: reasons by path of the layers whose entries are trained as they are.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, layers: tuple[CentredLayer, ...], left_out: dict[str, str]
    ) -> None:
        self.layers, self.left_out = layers, left_out
        self._before: dict[nn.Parameter, Tensor] = {}
        self._handles = [
            optimizer.register_step_pre_hook(self._centre_gradients),
            optimizer.register_step_post_hook(self._shift_biases),
        ]

    def __str__(self) -> str:
        reasons = Counter(self.left_out.values())
        rest = "".join(f"; {count} not ({reason})" for reason, count in sorted(reasons.items()))
        return f"{len(self.layers)} layers are trained with centred inputs{rest}"

    def remove(self) -> None:
        """Let the optimizer step as it did before."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @torch.no_grad()
    def _centre_gradients(self, optimizer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Turn the gradient of w at constant b into that at constant b'."""
        if any(each is not None for each in (*args[1:], *kwargs.values())):
            raise ValueError(
                f"{type(optimizer).__name__}.step got a closure, which computes gradients anew, expected none. "
                "Remove the centring with CentredSteps.remove()."
            )
        self._before.clear()
        for layer in self.layers:
            layer.check()
            if layer.is_trained:
                self._before[layer.values] = layer.values.detach().clone()
                shift = centring(layer.bias.grad, layer.rows, layer.means)  # type: ignore[arg-type]
                layer.values.grad -= shift.to(layer.values.grad.dtype)  # type: ignore[union-attr, operator]

    @torch.no_grad()
    def _shift_biases(self, *_: Any) -> None:
        """Move b so that b' stays where the step has put it."""
        for layer in self.layers:
            if (before := self._before.pop(layer.values, None)) is not None:
                moved = (before - layer.values) * layer.means
                layer.bias.index_add_(0, layer.rows, moved.to(layer.bias.dtype))


def centring(bias_gradient: Tensor, rows: Tensor, means: Tensor) -> Tensor:
    """Return E[a] · ∂L/∂b of every entry, by which its gradient at constant b exceeds that at constant b'.

    Args:
        bias_gradient: `(neurons,)`.
        rows: `(nnz,)` int32, the neuron of each entry.
        means: `(nnz,)`, E[a] of its input.

    Returns:
        `(nnz,)`.
    """
    return means * bias_gradient.index_select(0, rows)


def centre_steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Any,
    *,
    adapter_name: str | None = None,
    num_batches: int | None = NUM_BATCHES,
    batch_size: int = 32,
    collator: Callable[..., Any] | None = None,
    progress: bool = False,
    run: Run | None = None,
) -> CentredSteps:
    """Let an optimizer train the entries of an adapter as if their inputs had the mean 0 on the base model.

        model.calibrate(loader)
        optimizer = torch.optim.AdamW(peft_fps.parameter_groups(model, 1e-2))
        centre_steps(model, optimizer, loader)

    This holds for layers that have a bias delta beside their entries. Between steps the adapter is an ordinary one, so
    that it is saved and merged as always. A step needs room for a copy of the entries. Weight decay of entries
    leaves b' as it is.

    Args:
        model: model with a selected adapter.
        optimizer: trains it, without a closure. What `Accelerator.prepare` returns is taken too.
        data: as `peft_fps.calibrate` takes it. The means are taken over its first batches.
        adapter_name: name of the adapter. Default: the active one.
        num_batches: number of batches after which to stop. None for all.
        batch_size: examples per batch, if `data` holds examples.
        collator: turns a list of examples into a batch.
        progress: show a progress bar.
        run: runs the base model on a batch; see `peft_fps.calibrate`.

    Returns:
        What is centred and what is not. Its `remove()` undoes it.

    Raises:
        TypeError: the optimizer is DeepSpeed's, or none.
        ValueError: no layer can be centred, there is no data, or an input is not finite. Nothing is changed then.
    """
    stepped = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(stepped, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__}, expected a torch.optim.Optimizer or what accelerate makes of "
            "one: steps of DeepSpeed cannot be centred."
        )
    name = adapter_name or active_adapter(model)
    layers = entry_layers(adapter_layers(model, name))
    left_out = {path: reason for path, layer in layers.items() if (reason := _obstacle(layer, name))}
    if len(left_out) == len(layers):
        reasons = ", ".join(sorted(set(left_out.values()))) or "it has no layers"
        raise ValueError(f"adapter {name!r}: no layer can be centred ({reasons}), expected some with bias deltas.")
    passes = Pass(data, num_batches, batch_size, collator, progress, purpose="centre_steps")
    means = input_means(model, name, passes, run)
    left_out |= {path: "no data reached it" for path in layers if path not in means and path not in left_out}
    centred = tuple(_centred(path, layer, name, means[path]) for path, layer in layers.items() if path not in left_out)
    return CentredSteps(stepped, centred, left_out)


def _obstacle(layer: EntryLayer, adapter_name: str) -> str:
    """Return why a layer cannot be centred, nothing if it can."""
    values, bias = layer.fps_values[adapter_name], layer.bias_delta(adapter_name)
    if layer.sizes(adapter_name).entries == 0:
        return "no entries"
    if bias is None:
        return "no bias delta"
    if any(is_sharded(each) or is_partitioned(each) for each in (values, bias)):
        return "sharded"
    return "" if values.requires_grad and bias.requires_grad else "frozen"


def _centred(path: str, layer: EntryLayer, adapter_name: str, means: Tensor) -> CentredLayer:
    """Return a layer's entries with the means of their inputs.

    Args:
        path: of the layer in the base model.
        layer: the layer.
        adapter_name: name of the adapter.
        means: `(groups, inputs)`.
    """
    values, counts = layer.fps_values[adapter_name], layer.fps_row_counts[adapter_name]
    rows = torch.repeat_interleave(torch.arange(layer.neurons, device=counts.device), counts.long())
    groups = rows // (layer.neurons // means.shape[0])
    own = means.to(counts.device)[groups, layer.fps_columns[adapter_name].long()]
    return CentredLayer(path, values, layer.fps_bias[adapter_name], rows.int(), own.to(values))
