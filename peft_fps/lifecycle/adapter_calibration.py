"""The calibration of an adapter: data decides which entries it has, on any model that carries one."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from peft_fps.base.compiled import run_eagerly
from peft_fps.base.sharded import check_whole, has_shards, reshard
from peft_fps.calibration import InputStatistics, Pass, Run, called_anywhere, calls_noted, device_of, failing_together
from peft_fps.config import FPSConfig, adapter_config
from peft_fps.gradients import Loss
from peft_fps.importance import IMPORTANCES, Evidence, Gathering, Request
from peft_fps.importance.scorer import scorer
from peft_fps.layers.embedding import Embedding
from peft_fps.layers.entry_layer import EntryLayer
from peft_fps.layers.fps_layer import FPSLayer
from peft_fps.layers.lookup import active_adapter, adapter_state, base_model, entry_layers, target_layers
from peft_fps.lifecycle.adapters_off import adapters_off
from peft_fps.lifecycle.calibration_warnings import (
    NOT_TRAINABLE,
    warn_of_idle_experts,
    warn_of_tied_uses,
    warn_of_unreached,
)
from peft_fps.lifecycle.entry_allocation import entries_of_reached
from peft_fps.lifecycle.entry_replacement import check_selectable, rank, set_entries
from peft_fps.lifecycle.selection_report import selection_report
from peft_fps.lifecycle.token_choice import chosen_token_blocks
from peft_fps.selection import SelectionReport
from peft_fps.selection.calibration_record import CalibrationRecord
from peft_fps.tokens.token_placement import place_token_selection


RECORDED = ("importance", "order", "granularity", "seed")
"""What of the config is kept with a selection, besides what its importance depends on."""


BEFORE_SHARDING = (
    "Calibrate before the model is sharded, in every process and without FPSCallback, or in one process alone, and "
    "give the selection to the others (Selection.save, Selection.load)."
)


def _collective(model: nn.Module, data: Any = None, *, adapter_name: str | None = None, **_: Any) -> Any:
    """Return the device on which the processes of a distributed run exchange their sums, None if they need not."""
    name = adapter_name or active_adapter(model)
    config = adapter_config(model, name)
    base = base_model(model)
    meets = IMPORTANCES[config.importance].needs in ("forward", "backward") and config.needs_calibration
    return device_of(base) if meets or has_shards(base) else None


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

    The base model runs with adapters off, in evaluation mode, and without gradients where the importance needs none.
    A short training (importance `"movement"` and `"l0"`) works on copies of the weights. Weights, buffers, training
    modes, random states, what requires grad and hooks are as before, bit for bit, whatever happens.

    Input statistics leave out padded positions where a batch has an `attention_mask`, for images of different sizes a
    `pixel_attention_mask` of patches, or PyTorch's `src_key_padding_mask` or `key_padding_mask`. The padding of a
    decoder is read off its own mask, the labels or the padding tokens. Behind the convolutions of speech models the
    frames of padded sound do not count. A warning names modules whose inputs have other positions than the mask, or
    whose mask has another form, such as the `pixel_mask` of detectors.

    In a distributed run every process brings its own share of the data, which may be empty. All processes get the same
    selection, or the error of the one that failed, with its rank. What accelerate's loaders repeat in the last batches
    does not count.

    A model that FSDP2 has sharded is calibrated with the parameters of one module gathered at a time, by an importance
    that needs no gradients. All processes call this function together. Its modules keep their numbers of entries.

    A module that no batch reaches gets no entries and no bias delta, and a warning names it. Examples are unused
    poolers, experts (as layers of their own) without a token, and layers whose weight the model reads without calling
    them. With `budget` its part of the budget goes to the other modules. With `per_neuron` these keep their numbers of
    entries.

    Args:
        model: a model with an FPS adapter: a `PeftModel`, or a transformers model after `add_adapter`.
        data: a `DataLoader` or another iterable of batches, or examples: a dataset, or with a `collator` any sequence.
            A batch is a mapping, a tuple whose first element is the input (a second one that is its
            mask of padding goes to the model as well), or a tensor. A mapping is passed by name,
            or whole to a model that takes one mapping, as sentence-transformers do. Columns of texts (several
            mappings, or names with a prefix such as `anchor_input_ids`) go through the model one after the other.
            Labels stand under `labels`, or second in a tuple. Not needed if the importance uses no data.
        adapter_name: name of the adapter. Default: the active one.
        num_batches: number of batches after which to stop. Default: all.
        batch_size: examples per batch, if `data` holds examples. Default: 32.
        collator: turns a list of examples into a batch. Default: transformers' default collator, for datasets.
        progress: show a progress bar. Default: True.
        discard_values: allow calibration although training has begun. The learned changes are lost. Default: False.
        loss: from the model's outputs and the batch to a scalar, a mean over the batch. Default: the `loss` among the
            outputs, or else the cross-entropy of the logits with the labels.
        views: makes two views `(2 * batch, ...)` of images `(batch, ...)` for `loss="contrastive"`. Default:
            `peft_fps.gradients.TwoViews()`, which needs kornia and images normalised with mean and standard deviation
            0.5.
        accumulators: where sums of gradients are held, one number per targeted weight: on the `"device"` of the
            weights, the default, or on the `"cpu"`. `"streaming"` holds a shortlist: the entries that are largest in
            the first batch, eight times as many as will be selected. It misses entries that become large only later.
        training_mode: run backward passes in training mode, with dropout, as GPS's code does. Default: False.
        run: called with the base model and a batch of any kind on the model's device. It runs the model and returns
            the outputs, whose entry `loss` counts where a loss is needed. Default: batches are passed as said above.

    Returns:
        What was selected. It prints as a table.

    Raises:
        TypeError: the data is of an unknown kind, or the model takes nothing of what a batch holds.
        ValueError: no data; activations, losses or gradients that are not finite; gradients that are zero everywhere;
            an adapter that is merged, on the meta device, or trained; or, where the importance needs gradients,
            weights that are quantised, offloaded, or made in inference mode. The model is unchanged then.
    """
    adapter_name = adapter_name or active_adapter(model)
    config, layers = adapter_config(model, adapter_name), target_layers(model, adapter_name)
    reshard(model)
    check_selectable(layers, adapter_name, discard_values)
    forward = IMPORTANCES[config.importance].needs in ("nothing", "forward")
    verb = f"calibrate with importance={config.importance!r}"
    check_whole(base_model(model), verb, BEFORE_SHARDING, allow_fsdp=forward)
    if config.needs_calibration:
        batches = Pass(
            data,
            num_batches=num_batches,
            batch_size=batch_size,
            collator=collator,
            progress=progress,
            epochs=config.selection_epochs if IMPORTANCES[config.importance].needs == "training" else 1,
            purpose=f"importance={config.importance!r}",
        )
        how = Gathering(loss, views, accumulators, training_mode, run)
        findings = _gather(base_model(model), layers, config, adapter_name, batches, how)
    else:
        carrying = {path for path, layer in layers.items() if layer.carries(adapter_name)}
        findings = _Findings({}, carrying, CalibrationRecord(**_settings(config, RECORDED)))
    weighted = entry_layers(layers)
    entries = entries_of_reached(base_model(model), config, layers, adapter_name, findings.reached)
    scores = {path: scorer(weighted[path], path, config, findings.evidence) for path in entries}
    selected = rank(weighted, config, entries, scores)
    token_blocks = chosen_token_blocks(model, config, weighted, scores)
    set_entries(layers, adapter_name, selected, findings.reached)
    unreached = tuple(path for path in layers if path not in findings.reached)
    if unreached:
        kind = "saw no input" if IMPORTANCES[config.importance].needs == "forward" else NOT_TRAINABLE
        warn_of_unreached(unreached, layers, config, kind)
    warn_of_idle_experts(layers, findings.evidence)
    state = adapter_state(layers, adapter_name)
    state.selected, state.calibration = True, replace(findings.record, unreached=unreached)
    if state.token_blocks != token_blocks:
        state.token_blocks = token_blocks
        place_token_selection(model)
    return replace(selection_report(model, adapter_name), unseen=_unseen(weighted, adapter_name, findings.evidence))


def _unseen(layers: Mapping[str, EntryLayer], adapter_name: str, evidence: Evidence) -> dict[str, int]:
    """Return the number of entries at tokens that the data does not hold, by path of the embeddings that have such."""
    numbers = {}
    for path, layer in layers.items():
        statistics = evidence.get(path)
        if isinstance(layer, Embedding) and isinstance(statistics, InputStatistics):
            seen = (statistics.sums[0] > 0).to(layer.fps_columns[adapter_name].device)
            numbers[path] = int((~seen[layer.fps_columns[adapter_name].long()]).sum())
    return {path: number for path, number in numbers.items() if number}


@dataclass(frozen=True)
class _Findings:
    """Results of a run over the data.

    Attributes:
        evidence: what the importance scores by, by module path.
        reached: paths of the modules that the data has reached.
        record: how the entries are chosen, for the adapter's file.
    """

    evidence: Evidence
    reached: set[str]
    record: CalibrationRecord


def _gather(
    base: nn.Module,
    layers: Mapping[str, FPSLayer],
    config: FPSConfig,
    adapter_name: str,
    batches: Pass,
    how: Gathering,
) -> _Findings:
    """Run the base model over the data, as the importance of the config needs.

    Args:
        base: base model. Its adapters are switched off meanwhile.
        layers: all that the adapter targets, by path.
        config: of the adapter.
        adapter_name: name of the adapter.
        batches: the data.
        how: arguments of `calibrate`.
    """
    importance, weighted = IMPORTANCES[config.importance], entry_layers(layers)
    assert importance.gather is not None
    watched = {**layers, **{place: use for layer in weighted.values() for place, use in layer.sharing.items()}}
    with adapters_off(base, adapter_name), run_eagerly(base), calls_noted(watched) as called:
        evidence, counts = importance.gather(Request(base, weighted, config, adapter_name, batches, how))
    called = called_anywhere(called, list(watched), base)
    sharing = {path: layer.sharing for path, layer in weighted.items()}
    reached = {path for path in layers if path in called or not called.isdisjoint(sharing.get(path, ()))}
    if config.loss != "contrastive":  # which ends before the head, and tells nothing of what lies behind
        reached = {path for path in reached if path in evidence or path not in weighted}
        warn_of_tied_uses(weighted, called)
    noted = _settings(config, (*RECORDED, *importance.recorded)) | counts
    return _Findings(evidence, reached, CalibrationRecord(**noted))


def _settings(config: FPSConfig, names: Iterable[str]) -> dict[str, Any]:
    """Return the values of the named fields of a config, by name."""
    return {name: getattr(config, name) for name in names}
