"""An adapter gets other entries: whether it may, which are the best, and setting them in its layers."""

from collections.abc import Container, Mapping

from peft_fps.base.sharded import own_part
from peft_fps.calibration import gathered_in_turn
from peft_fps.config import FPSConfig
from peft_fps.importance import Score
from peft_fps.layers.entry_layer import EntryLayer
from peft_fps.layers.fps_layer import FPSLayer
from peft_fps.selection import Candidate, select_entries
from peft_fps.selection.barred_input import with_input, without_input
from peft_fps.selection.candidate import Selected


def check_selectable(layers: Mapping[str, FPSLayer], adapter_name: str, discard_values: bool) -> None:
    """Check that an adapter may get new entries.

    Args:
        layers: of the adapter, by module path.
        adapter_name: its name.
        discard_values: allow an adapter that is trained.

    Raises:
        ValueError: an adapter is merged, the tensors are on the meta device, or training has begun.
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
                "low_cpu_mem_usage, or, if accelerate offloads the model, let it do so before the adapter is "
                "attached. Nothing was changed."
            )
        trained = any(bool(own_part(parameter.detach()).nan_to_num().any()) for parameter in parameters)
        if trained and not discard_values:
            raise ValueError(
                f"{path}: adapter {adapter_name!r} holds trained changes, expected none, since choosing "
                "new entries would discard them. Choose before training, or pass discard_values=True. Nothing "
                "was changed."
            )


def rank(
    layers: Mapping[str, EntryLayer], config: FPSConfig, entries: Mapping[str, int], scores: Mapping[str, Score]
) -> dict[str, Selected]:
    """Return the best entries of layers by their scores, spread as the config says. No layer is changed.

    Args:
        layers: by module path.
        config: says how entries are spread, by `granularity`, `block_top` and `order`.
        entries: number of entries of each layer, by path. `"neuron"` and `"layer"` keep these numbers. Under the other
            granularities only their sum counts.
        scores: of the layers named in `entries`, by path.

    Returns:
        Columns `(nnz,)` and row counts `(neurons,)` of each layer, by path.
    """
    barred = {path: layers[path].barred_input(layers[path].base_layer) for path in entries}
    with gathered_in_turn(layers, scores) as scores:
        candidates = {
            path: without_input(Candidate(layers[path].shape, count, scores[path]), barred[path])
            for path, count in entries.items()
        }
        selected = select_entries(candidates, config.granularity, block_top=config.block_top, order=config.order)
    return {path: with_input(found, barred[path]) for path, found in selected.items()}


def check_sizes_kept(
    layers: Mapping[str, FPSLayer], adapter_name: str, selected: Mapping[str, Selected], reached: Container[str]
) -> None:
    """Check that sharded layers keep the numbers of entries with which they were sharded.

    Args:
        layers: all that the adapter targets, by module path.
        adapter_name: its name.
        selected: columns and row counts, as for `set_entries`.
        reached: paths of the layers in which the adapter is to hold something.

    Raises:
        ValueError: a sharded layer would get another number of entries, or a sharded bias delta would come or go.
    """
    for path, layer in layers.items():
        if not layer.is_sharded(adapter_name):
            continue
        entries = selected[path][0].numel() if path in reached and path in selected else 0
        found = layer.sizes(adapter_name).entries
        if entries != found or (path in reached) != layer.carries(adapter_name):
            raise ValueError(
                f"{path}: the selection gives it {entries:,} entries, expected {found:,}, with which it was sharded. "
                "Modules that no data reaches, and a granularity other than 'neuron' and 'layer', change these "
                "numbers. Choose the entries before the model is sharded, in every process. Nothing was changed."
            )


def set_entries(
    layers: Mapping[str, FPSLayer], adapter_name: str, selected: Mapping[str, Selected], reached: Container[str]
) -> None:
    """Give the adapter new entries with zero changes; in layers that are not reached it holds nothing from now on.

    Args:
        layers: all that the adapter targets, by module path.
        adapter_name: its name.
        selected: columns `(nnz,)` and row counts `(neurons,)` of every layer with entries that is reached.
        reached: paths of the layers in which the adapter is to hold something.

    Raises:
        ValueError: a sharded layer would get another number of entries. Nothing is changed then.
    """
    check_sizes_kept(layers, adapter_name, selected, reached)
    for path, layer in layers.items():
        if path not in reached:
            layer.leave_out(adapter_name)
        elif isinstance(layer, EntryLayer):
            layer.set_selection(adapter_name, *selected[path])
        else:
            layer.start_from_zero(adapter_name)
