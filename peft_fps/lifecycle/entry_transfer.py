"""Entries apart from an adapter: taken from one, given to one, or chosen for one by scores of the user's own."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from peft_fps.base.renamed_modules import current_names
from peft_fps.base.sharded import gathered, reshard
from peft_fps.config import FPSConfig, adapter_config
from peft_fps.importance import Score
from peft_fps.layers.entry_layer import EntryLayer
from peft_fps.layers.fps_layer import FPSLayer
from peft_fps.layers.lookup import adapter_layers, adapter_state, base_model, entry_layers, target_layers
from peft_fps.lifecycle.entry_replacement import check_selectable, rank, set_entries
from peft_fps.selection.budget_allocation import exact
from peft_fps.selection.calibration_record import CalibrationRecord
from peft_fps.selection.entries import ModuleEntries, check_same_modules
from peft_fps.selection.own_scores import checked_scores
from peft_fps.sparse import StructureError
from peft_fps.targets.base_parameters import count_base_parameters


def entries_of(model: nn.Module, adapter_name: str) -> dict[str, ModuleEntries]:
    """Return copies on the CPU of an adapter's entries, by module path. Modules with a bias delta alone have none.

    Args:
        model: has the adapter.
        adapter_name: its name.

    Raises:
        ValueError: the adapter's tensors are not loaded, or they are damaged.
    """
    layers, modules = adapter_layers(model, adapter_name), {}
    for path, layer in layers.items():
        if layer.awaits_loading(adapter_name):
            raise ValueError(
                f"{path}: the tensors of adapter {adapter_name!r} are not loaded, expected selected entries. Load an "
                "adapter file, or select entries with model.calibrate(...), before taking the selection."
            )
    for path, weighted in entry_layers(layers).items():
        columns, row_counts = weighted.fps_columns[adapter_name], weighted.fps_row_counts[adapter_name]
        try:
            modules[path] = ModuleEntries.of_size(columns, row_counts, weighted.shape.neurons, weighted.shape.inputs)
        except StructureError as error:
            raise ValueError(
                f"{path}: adapter {adapter_name!r}: {error}. Its tensors are damaged or incomplete; load an intact "
                "file."
            ) from error
    return modules


def give_entries(
    model: nn.Module,
    adapter_name: str,
    modules: Mapping[str, ModuleEntries],
    record: CalibrationRecord,
    *,
    discard_values: bool,
) -> None:
    """Give an adapter entries with zero changes instead of those it has.

    Args:
        model: has the adapter.
        adapter_name: its name.
        modules: the entries by module path. Paths of an older version of transformers are renamed.
        record: how the entries were chosen. The adapter holds nothing in the modules that it names as unreached.
        discard_values: allow it although training has begun.

    Raises:
        ValueError: the adapter has other modules or too small a budget, holds trained changes, is merged, or is not
            loaded. The model is unchanged then.
    """
    config, layers = adapter_config(model, adapter_name), target_layers(model, adapter_name)
    base = base_model(model)
    reshard(model)
    check_selectable(layers, adapter_name, discard_values)
    if config.token_keep_rate is not None and config.token_blocks is None:
        raise ValueError(
            f"adapter {adapter_name!r}: token_blocks is None, expected the indices of the blocks that select tokens, "
            "since a selection holds no scores to choose them by. Add the adapter with token_blocks=[...]. Nothing "
            "was changed."
        )
    given = current_names(base, modules)
    unreached = set(current_names(base, dict.fromkeys(record.unreached))) - given.keys()
    check_same_modules(
        {path: module.shape for path, module in given.items()},
        {path: layer.shape for path, layer in entry_layers(layers).items() if path not in unreached},
        "the selection",
        f"adapter {adapter_name!r}",
        "Apply the selection to an adapter with the target_modules and the base model that it was made with. "
        "Nothing was changed.",
    )
    entries = sum(module.entries for module in given.values())
    biased = [layer for path, layer in layers.items() if adapter_name in layer.fps_bias and path not in unreached]
    _check_budget(entries, config, sum(layer.neurons for layer in biased), base, adapter_name)
    selected = {path: (module.columns, module.row_counts) for path, module in given.items()}
    set_entries(layers, adapter_name, selected, layers.keys() - unreached)
    state = adapter_state(layers, adapter_name)
    state.selected, state.calibration = True, record


def best_entries(
    layers: Mapping[str, FPSLayer], adapter_name: str, config: FPSConfig, score: Callable[[str, Tensor], Tensor]
) -> dict[str, ModuleEntries]:
    """Return the entries that are best by a score of the user's own, by module path. The model is not changed.

    Args:
        layers: those in which the adapter holds something, by module path.
        adapter_name: its name. There are as many entries as it has.
        config: of the adapter. It says how entries are spread.
        score: from a module path and the weight `(neurons, inputs)` to scores of that shape.

    Raises:
        TypeError: scores are no floating tensor.
        ValueError: scores have a wrong shape, are negative, or not finite; or there are fewer entries than the
            granularity needs.
    """
    weighted = entry_layers(layers)
    scorers = {path: _rows_of(_own_scores(path, layer, score)) for path, layer in weighted.items()}
    entries = {path: layer.fps_values[adapter_name].numel() for path, layer in weighted.items()}
    ranked = rank(weighted, config, entries, scorers)
    return {path: ModuleEntries(*ranked[path], layer.shape.inputs) for path, layer in weighted.items()}


@torch.no_grad()
def _own_scores(path: str, layer: EntryLayer, score: Callable[[str, Tensor], Tensor]) -> Tensor:
    """Return the user's scores of a layer, checked, `(neurons, inputs)` float32 without gradient."""
    with gathered([layer.base_layer]):
        weight = layer.weight_rows(0, layer.shape.neurons)
        return checked_scores(path, score(path, weight), layer.shape)


def _rows_of(scores: Tensor) -> Score:
    """Return a score that reads runs of neurons from scores `(neurons, inputs)`."""
    return lambda first, last: scores[first:last]


def _check_budget(entries: int, config: FPSConfig, biases: int, base: nn.Module, name: str) -> None:
    """Raise ValueError if so many entries and bias deltas together exceed the adapter's budget."""
    if config.budget is None:
        return
    parameters = count_base_parameters(base)
    # a budget of 0 trains the biases, and they do not count
    limit = int(exact(config.budget) * parameters) if config.budget else biases
    if entries + biases > limit:
        raise ValueError(
            f"adapter {name!r}: the selection has {entries:,} entries, which with {biases:,} bias deltas train "
            f"{entries + biases:,} parameters, expected at most {limit:,} by budget={config.budget} of "
            f"{parameters:,}. Add the adapter with a larger budget. Nothing was changed."
        )
