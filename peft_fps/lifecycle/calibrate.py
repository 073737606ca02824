"""The verbs that choose and report an adapter's entries, on any model that carries one."""

from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from peft_fps.base.compiled import run_eagerly
from peft_fps.base.sharded import check_whole
from peft_fps.calibration import Pass, Run, called_anywhere, calls_noted, device_of, failing_together
from peft_fps.card.selection_method import describe
from peft_fps.checkpoint import encoded_bytes, no_entries
from peft_fps.config import FPSConfig
from peft_fps.config_lookup import adapter_config
from peft_fps.gradients import Loss
from peft_fps.importance import IMPORTANCES, Evidence, Gathering, Request, Score
from peft_fps.importance.random import random_scorer
from peft_fps.importance.scorer import scorer
from peft_fps.layers.entry_layer import EntryLayer
from peft_fps.layers.fps_layer import FPSLayer
from peft_fps.layers.lookup import (
    active_adapter,
    adapter_layers,
    base_model,
    entry_layers,
    target_layers,
    whole_parameters,
)
from peft_fps.lifecycle.unreached import entries_of_reached, warn_of_unreached
from peft_fps.selection import Candidate, LayerSelection, NormSelection, SelectionReport, select_entries
from peft_fps.selection.calibration_record import CalibrationRecord
from peft_fps.selection.candidate import Selected
from peft_fps.targets.base_parameters import count_base_parameters


RECORDED = ("importance", "order", "granularity", "seed")
"""What of the config is kept with a selection, besides what its importance depends on."""


def _collective(model: nn.Module, data: Any = None, *, adapter_name: str | None = None, **_: Any) -> Any:
    """Return the device on which a calibration meets with other processes, None if it does not."""
    name = adapter_name or active_adapter(model)
    config = adapter_config(model, name)
    meets = IMPORTANCES[config.importance].needs in ("forward", "backward")
    return device_of(base_model(model)) if meets and config.needs_calibration else None


@failing_together(_collective)
def calibrate(
    model: nn.Module,
    data: Any = None,
    *,
    adapter_name: str | None = None,
    num_batches: int | None = None,
    batch_size: int = 32,
    collator: Callable[..., Any] | None = None,
    progress: bool = True,
    discard_values: bool = False,
    loss: Loss | None = None,
    views: Callable[[Tensor], Tensor] | None = None,
    accumulators: Literal["device", "cpu", "streaming"] = "device",
    training_mode: bool = False,
    run: Run | None = None,
) -> SelectionReport:
    """Choose the entries of an adapter as its config says, from passes over data.

    The base model runs, adapters off, in evaluation mode and without gradients where the importance needs none. A
    short training (importance `"movement"` and `"l0"`) works on copies of the weights. Weights, buffers, training
    modes, random states, what requires grad and hooks are as before, bit for bit, whatever happens. Padded positions
    are left out of input statistics where a batch has an `attention_mask` of two dimensions; a decoder's as its own
    mask, the labels or the padding tokens say. In a distributed run every process brings its own share of the data,
    which may be empty, and all get the same selection, or the error of the one that failed, with its rank. Modules
    that no batch reached would not be trained either (unused poolers, experts without a token, layers whose weight
    the model reads without calling them): they are named in a warning and hold nothing, and their part of the budget
    goes to the others.

    Args:
        model: a model with an FPS adapter: a `PeftModel`, or a transformers model after `add_adapter`.
        data: a `DataLoader` or another iterable of batches, or examples: a dataset, or with a `collator` any sequence.
            A batch is a mapping passed by name (or whole, where the model takes one mapping, as sentence-transformers
            do), a tuple whose first element is the input, or a tensor. Columns of texts, several mappings or names
            with a prefix (`anchor_input_ids`), go through the model one after the other. Labels stand under `labels`,
            or second in a tuple. Not needed if the importance uses no data.
        adapter_name: the active adapter if None.
        num_batches: stop after so many batches; the whole pass if None.
        batch_size: examples per batch, if `data` holds examples.
        collator: turns a list of examples into a batch; for datasets transformers' default collator if None.
        progress: show a progress bar.
        discard_values: allow calibration although training has begun; the learned changes are lost.
        loss: from the model's outputs and the batch to a scalar, a mean over the batch. If None, the `loss` among the
            outputs, or else the cross-entropy of the logits with the labels.
        views: makes two views of each image for `loss="contrastive"`, `(2 * batch, ...)` of `(batch, ...)`; if None
            `TwoViews()`, which needs kornia and images normalised with mean and standard deviation 0.5.
        accumulators: where sums of gradients are held, one number per targeted weight: on the `"device"` of the
            weights, or on the `"cpu"`. `"streaming"` holds a shortlist, eight times the entries that will be selected
            and largest in the first batch, and misses entries that become large only later.
        training_mode: backward passes in training mode, dropout active, as GPS's code has it.
        run: called with the base model and a batch on its device, of any kind then; runs the model, and returns its
            outputs, whose entry `loss` counts where a loss is needed. If None, batches are passed as said above.

    Returns:
        What was selected; prints as a table.

    Raises:
        TypeError: the data is of an unknown kind, or the model takes nothing of what a batch holds.
        ValueError: no data, activations, losses or gradients that are not finite, or a model that is merged, offloaded
            without hooks, or has been trained. The model is unchanged then.
    """
    adapter_name = adapter_name or active_adapter(model)
    config, layers = adapter_config(model, adapter_name), target_layers(model, adapter_name)
    check_selectable(layers, adapter_name, discard_values)
    check_whole(
        base_model(model),
        "calibrate",
        "Calibrate before the model is sharded, in every process and without FPSCallback, or in one process alone, "
        "and give the selection to the others (Selection.save, Selection.load).",
    )
    evidence: Evidence = {}
    weighted = entry_layers(layers)
    reached = {path for path, layer in layers.items() if layer.carries(adapter_name)}
    noted: dict[str, Any] = {key: getattr(config, key) for key in RECORDED}
    if config.needs_calibration:
        importance, base = IMPORTANCES[config.importance], base_model(model)
        assert importance.gather is not None
        batches = Pass(
            data,
            num_batches=num_batches,
            batch_size=batch_size,
            collator=collator,
            progress=progress,
            epochs=config.selection_epochs if importance.needs == "training" else 1,
            purpose=f"importance={config.importance!r}",
        )
        how = Gathering(loss, views, accumulators, training_mode, run)
        with _adapters_off(base, adapter_name), run_eagerly(base), calls_noted(layers) as called:
            evidence, counts = importance.gather(Request(base, weighted, config, adapter_name, batches, how))
        noted |= {key: getattr(config, key) for key in importance.recorded} | counts
        reached = called_anywhere(called, list(layers), base)
        if config.loss != "contrastive":  # which ends before the head, and tells nothing of what lies behind
            reached = {path for path in reached if path in evidence or path not in weighted}
    entries = entries_of_reached(model, adapter_name, reached)
    scores = {path: scorer(weighted[path], path, config, evidence) for path in entries}
    _select(layers, config, adapter_name, entries, scores, reached)
    if unreached := [path for path in layers if path not in reached]:
        found = "saw no input" if IMPORTANCES[config.importance].needs == "forward" else "got no gradient"
        warn_of_unreached(unreached, layers, config, found)
        noted["unreached"] = tuple(unreached)
    state = next(iter(layers.values())).fps_state[adapter_name]
    state.selected, state.calibration = True, CalibrationRecord(**noted)
    return selection_report(model, adapter_name)


def selection_report(model: nn.Module, adapter_name: str | None = None) -> SelectionReport:
    """Return what an adapter has selected, per module and in total.

    Args:
        model: a model with an FPS adapter.
        adapter_name: the active adapter if None.
    """
    adapter_name = adapter_name or active_adapter(model)
    config, layers = adapter_config(model, adapter_name), adapter_layers(model, adapter_name)
    rows: list[LayerSelection] = []
    for path, layer in layers.items():
        biases = layer.neurons if layer.bias_delta(adapter_name) is not None else 0
        if isinstance(layer, EntryLayer):
            values, counts, shape = layer.fps_values[adapter_name], layer.fps_row_counts[adapter_name], layer.shape
            size = encoded_bytes(counts, shape.inputs, values.element_size(), biases)
            rows.append(LayerSelection(path, shape.neurons, shape.inputs, values.numel(), biases, size))
        else:
            held = no_entries(layer.fps_bias[adapter_name])
            size = encoded_bytes(held["fps_row_counts"], 0, held["fps_values"].element_size(), biases)
            rows.append(NormSelection(path, layer.neurons, biases=biases, bytes=size))
    head = whole_parameters(model, adapter_name).values()
    state = next(iter(layers.values())).fps_state[adapter_name]
    return SelectionReport(
        layers=tuple(rows),
        base_parameters=count_base_parameters(base_model(model)),
        head_parameters=sum(parameter.numel() for parameter in head),
        head_bytes=sum(parameter.numel() * parameter.element_size() for parameter in head),
        budget=config.budget,
        method=describe(config, state),
        unreached=() if state.calibration is None else state.calibration.unreached,
    )


def select_without_data(model: nn.Module, config: FPSConfig, adapter_name: str) -> None:
    """Give a new adapter its first entries: by magnitude where its importance needs data, else as it says.

    With `init_weights=False`, random entries and random non-zero changes, drawn from torch's global generator.
    """
    layers = adapter_layers(model, adapter_name)
    parameters = (parameter for layer in layers.values() for parameter in layer.adapter_parameters(adapter_name))
    if any(parameter.device.type == "meta" for parameter in parameters):
        return  # nothing to rank; the tensors are to be loaded
    seed = None if config.init_weights else int(torch.randint(2**62, (), device="cpu"))
    scores = {
        path: scorer(layer, path, config, {}) if seed is None else random_scorer(layer, path, seed)
        for path, layer in entry_layers(layers).items()
    }
    entries = {path: layer.fps_values[adapter_name].numel() for path, layer in entry_layers(layers).items()}
    _select(layers, config, adapter_name, entries, scores, layers)
    if not config.init_weights:
        for layer in layers.values():
            for parameter in layer.adapter_parameters(adapter_name):
                # bounded away from zero, so that no change can vanish
                noise = torch.rand(parameter.shape, dtype=torch.float32, device="cpu") + 0.5
                sign = torch.randint(2, parameter.shape, device="cpu") * 2 - 1
                parameter.data.copy_(noise * sign)


def check_selectable(layers: Mapping[str, FPSLayer], adapter_name: str, discard_values: bool) -> None:
    """Raise ValueError unless an adapter may get new entries: not merged, loaded, and not trained.

    Args:
        layers: of the adapter, by module path.
        adapter_name: its name.
        discard_values: allow an adapter that is trained.
    """
    for path, layer in layers.items():
        if layer.merged:
            raise ValueError(
                f"{path}: found merged adapters {layer.merged_adapters}, expected none while entries are chosen. Call "
                "model.unmerge_adapter() first. Nothing was changed."
            )
        parameters = layer.adapter_parameters(adapter_name)
        if any(parameter.device.type == "meta" for parameter in parameters):
            raise ValueError(
                f"{path}: adapter {adapter_name!r} is on the meta device, expected loaded tensors. Build it without "
                "low_cpu_mem_usage. Nothing was changed."
            )
        trained = any(bool(parameter.detach().nan_to_num().any()) for parameter in parameters)
        if trained and not discard_values:
            raise ValueError(
                f"{path}: adapter {adapter_name!r} holds trained changes, expected none, since choosing "
                "new entries would discard them. Choose before training, or pass discard_values=True. Nothing "
                "was changed."
            )


@contextmanager
def _adapters_off(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """Let the layers compute as the base model does, and modules that the adapter trains whole as they are in it.

    What is trainable is not touched.
    """
    layers = [module for module in model.modules() if isinstance(module, FPSLayer)]
    before = [layer._disable_adapters for layer in layers]
    wrappers = [
        module
        for module in model.modules()
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save
    ]
    active = [wrapper._active_adapter for wrapper in wrappers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        for wrapper in wrappers:
            wrapper._active_adapter = [adapter_name]
        yield
    finally:
        for wrapper, names in zip(wrappers, active, strict=True):
            wrapper._active_adapter = names
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled


def rank(
    layers: Mapping[str, EntryLayer], config: FPSConfig, entries: Mapping[str, int], scores: Mapping[str, Score]
) -> dict[str, Selected]:
    """Return the best entries of layers by their scores, spread as the config says.

    Args:
        layers: by module path.
        config: says how entries are spread.
        entries: how many each layer is to have, or what adds up to those of all where the config spreads them.
        scores: of the layers named in `entries`.
    """
    candidates = {path: Candidate(layers[path].shape, count, scores[path]) for path, count in entries.items()}
    return select_entries(candidates, config.granularity, block_top=config.block_top, order=config.order)


def _select(
    layers: Mapping[str, FPSLayer],
    config: FPSConfig,
    adapter_name: str,
    entries: Mapping[str, int],
    scores: Mapping[str, Score],
    reached: Container[str],
) -> None:
    """Rank and set the entries of the layers that are reached; in others the adapter holds nothing from now on.

    A layer is changed only after all are ranked.
    """
    ranked = rank(entry_layers(layers), config, entries, scores)
    for path, layer in layers.items():
        if path not in reached:
            layer.leave_out(adapter_name)
        elif isinstance(layer, EntryLayer):
            layer.set_selection(adapter_name, *ranked[path])
        else:
            layer.start_from_zero(adapter_name)
