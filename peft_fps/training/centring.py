"""Which layers' steps can be centred, and the call that centres them."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft_fps.base.sharded import is_partitioned, is_sharded
from peft_fps.base.substitution import TRANSPOSED
from peft_fps.calibration import Pass, Run
from peft_fps.layers.entry_layer import EntryLayer
from peft_fps.layers.lookup import active_adapter, adapter_layers, entry_layers
from peft_fps.lifecycle.input_means import input_means
from peft_fps.training.centred_steps import CentredLayer, CentredSteps, is_centred


NUM_BATCHES = 8
"""Batches that the means are taken over by default."""


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

    This holds for layers that have a bias delta beside their entries, transposed convolutions aside. Between steps the
    adapter is an ordinary one, so that it is saved and merged as always. A step needs room for a copy of the entries.
    Weight decay of entries leaves b' as it is.

    Args:
        model: model with a selected adapter.
        optimizer: trains it, without a closure. What `Accelerator.prepare` returns is taken too. It must not keep
            copies or averages of parameters, as schedule-free ones do.
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
        ValueError: no layer can be centred, the optimizer's steps are centred already, there is no data or none that
            reaches such a layer, or an input is not finite. Nothing is changed then.
    """
    name = adapter_name or active_adapter(model)
    stepped = stepped_optimizer(optimizer)
    layers, left_out = centrable(model, stepped, name)
    check_centrable(layers, left_out, stepped, name)
    passes = Pass(data, num_batches, batch_size, collator, progress, purpose="centre_steps")
    means = input_means(model, name, layers, passes, run)
    left_out |= {path: "no data reached it" for path in layers if path not in means}
    check_centrable({path: layers[path] for path in means}, left_out, stepped, name)
    centred = {path: _centred(layers[path], name, found) for path, found in means.items()}
    return CentredSteps(stepped, centred, left_out)


def stepped_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer inside accelerate's, whose steps have hooks, or the optimizer itself.

    Raises:
        TypeError: it is none of torch's.
    """
    stepped = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(stepped, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__}, expected a torch.optim.Optimizer or what accelerate makes of "
            "one: steps of DeepSpeed cannot be centred. Train without centring."
        )
    return stepped


def centrable(
    model: nn.Module, optimizer: torch.optim.Optimizer, adapter_name: str
) -> tuple[dict[str, EntryLayer], dict[str, str]]:
    """Return the layers whose entries can be centred, and the reasons why others cannot, by path in the base model.

    Args:
        model: model with the adapter.
        optimizer: as `stepped_optimizer` returns it.
        adapter_name: name of the adapter.
    """
    layers = entry_layers(adapter_layers(model, adapter_name))
    held = {id(parameter) for group in optimizer.param_groups for parameter in group.get("params", ())}
    left_out = {path: reason for path, layer in layers.items() if (reason := _obstacle(layer, adapter_name, held))}
    return {path: layer for path, layer in layers.items() if path not in left_out}, left_out


def check_centrable(
    layers: Mapping[str, EntryLayer],
    left_out: Mapping[str, str],
    optimizer: torch.optim.Optimizer,
    adapter_name: str,
) -> None:
    """Check that some layers can be centred, and that none is.

    Args:
        layers: those that can be, by path.
        left_out: reasons why others cannot.
        optimizer: steps them.
        adapter_name: name of the adapter.

    Raises:
        ValueError: there are none, or some are centred already.
    """
    if not layers:
        raise ValueError(
            f"adapter {adapter_name!r}: no layer can be centred ({told(left_out)}), expected some with entries and "
            "bias deltas that the optimizer trains. Choose FPSConfig(bias='all'), or train without centring."
        )
    for path, layer in layers.items():
        if is_centred(optimizer, layer, adapter_name):
            raise ValueError(
                f"{path}: steps of adapter {adapter_name!r} are centred already, expected an optimizer whose steps "
                "are not. Call remove() of what centre_steps has returned before."
            )


def told(left_out: Mapping[str, str]) -> str:
    """Return the different reasons why layers cannot be centred."""
    return ", ".join(sorted(set(left_out.values()))) or "it has no entries"


def _obstacle(layer: EntryLayer, adapter_name: str, held: set[int]) -> str:
    """Return why a layer cannot be centred, nothing if it can.

    Args:
        layer: the layer.
        adapter_name: name of the adapter.
        held: ids of the parameters that the optimizer trains.
    """
    values, bias = layer.fps_values[adapter_name], layer.bias_delta(adapter_name)
    if layer.sizes(adapter_name).entries == 0:
        return "no entries"
    if bias is None:
        return "no bias delta"
    if isinstance(layer.base_layer, TRANSPOSED):
        return "transposed convolution"  # at each output position, inputs reach only some of the entries
    if any(is_sharded(each) or is_partitioned(each) for each in (values, bias)):
        return "sharded"
    if not (values.requires_grad and bias.requires_grad):
        return "frozen"
    return "" if {id(values), id(bias)} <= held else "not in the optimizer"


def _centred(layer: EntryLayer, adapter_name: str, means: Tensor) -> CentredLayer:
    """Return a layer's entries with the means of their inputs.

    Args:
        layer: the layer.
        adapter_name: name of the adapter.
        means: `(groups, inputs)`.
    """
    structure, values = layer.structure(adapter_name), layer.fps_values[adapter_name]
    groups = structure.rows.long() // (layer.neurons // means.shape[0])
    own = means.to(values.device)[groups, layer.fps_columns[adapter_name].long()]
    return CentredLayer(layer, adapter_name, structure, own.to(values))
