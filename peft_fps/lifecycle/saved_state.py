"""What PEFT saves of an adapter: its tensors as they are on disk, and the record of them in the config."""

import warnings
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from peft_fps.base.buffers import buffer_digests
from peft_fps.base.compiled import plain_name
from peft_fps.base.sharded import is_partitioned, is_sharded, whole
from peft_fps.card import SavedAdapter
from peft_fps.checkpoint import TENSORS, encode, left_out_bias, no_entries, tensors_digest
from peft_fps.checkpoint.expected_contents import state_dict_path, whole_keys
from peft_fps.checkpoint.record import AdapterRecord
from peft_fps.config import FPSConfig
from peft_fps.layers.adapter_state import AdapterState
from peft_fps.layers.entry_layer import EntryLayer
from peft_fps.layers.fps_layer import FPSLayer
from peft_fps.layers.lookup import base_model, fps_layers, place_of
from peft_fps.layers.norm import Norm
from peft_fps.layers.tensor_checks import ONLY_PARAMETERS
from peft_fps.lifecycle.plan import fingerprint_of
from peft_fps.selection.module_sizes import ModuleSizes
from peft_fps.sparse import StructureError, check_entries


def saved_state(
    model: nn.Module, config: FPSConfig, adapter_name: str, state_dict: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return an adapter's tensors as they are on disk, and hand the record of them to its config.

    The config's `save_pretrained`, which PEFT calls next, writes the record.

    Args:
        model: has the adapter.
        config: of the adapter; gets the record.
        adapter_name: name of the adapter.
        state_dict: of the model, or the full one that was gathered from a sharded model. Sharded tensors in it are
            gathered one by one, and those of modules that are trained whole are replaced by whole ones. All processes
            call this function together then.

    Returns:
        The sparse tensors by the keys that they would have without LoRA layers, which hold the adapter's name.

    Raises:
        ValueError: the adapter's tensors are not valid. Nothing is written then.
    """
    result: dict[str, Tensor] = {}
    allocation: dict[str, ModuleSizes] = {}
    state = AdapterState()
    _gather_wholes(model, adapter_name, state_dict)
    for full_name, layer in fps_layers(model).items():
        if not layer.carries(adapter_name):
            continue
        keys = {name: f"{state_dict_path(full_name)}.{name}.{adapter_name}" for name in TENSORS}
        tensors = {name: whole(state_dict[key]) for name, key in keys.items() if key in state_dict}
        for name in layer.adapter_layer_names:
            _check_gathered(keys[name], getattr(layer, name).get(adapter_name), state_dict)
        if isinstance(layer, Norm):
            tensors |= no_entries(tensors["fps_bias"])
        elif "fps_bias" not in tensors and layer.has_inert_bias(adapter_name):
            tensors["fps_bias"] = left_out_bias(tensors["fps_values"], layer.neurons)
        _check_tensors(layer, adapter_name, tensors)
        state = layer.fps_state[adapter_name]
        sizes = allocation[layer.module_path] = layer.sizes(adapter_name)
        place = state_dict_path(place_of(model, full_name))
        result |= {
            f"{place}.{name}.{adapter_name}": encode(name, tensor, sizes.inputs) for name, tensor in tensors.items()
        }
    _warn_of_changed_buffers(model, adapter_name, state)
    record = AdapterRecord(
        allocation=allocation,
        calibration=state.calibration,
        # that of all targets was taken when the adapter was added
        base_fingerprint=(
            fingerprint_of(base_model(model), allocation) if state.unreached else state.base_fingerprint
        ),
        whole_tensors=tuple(sorted(whole_keys(model, adapter_name))),
        tensors_sha256=tensors_digest(
            {plain_name(key.removesuffix(f".{adapter_name}")): tensor for key, tensor in result.items()}
        ),
        selecting_blocks=state.token_blocks,
    )
    # several adapters may share one config object, so each hands over its own record just before it is saved
    config.to_save = SavedAdapter(record, state.base_parameters, state.evaluation)
    return result


def _warn_of_changed_buffers(model: nn.Module, adapter_name: str, state: AdapterState) -> None:
    """Warn of buffers of the base model that are no longer what they were when the adapter was added."""
    now = buffer_digests(base_model(model))
    changed = [name for name, digest in state.buffers.items() if now.get(name, digest) != digest]
    if changed:
        owner = changed[0].rpartition(".")[0]
        warnings.warn(
            f"{', '.join(changed)}: buffers of the base model have changed since adapter {adapter_name!r} was added, "
            "and are not saved with it, so that a reloaded model will compute something else. Train their modules "
            f"whole, with modules_to_save=[{owner!r}] for instance, or keep them in evaluation mode.",
            stacklevel=2,
        )


def _gather_wholes(model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor]) -> None:
    """Gather the modules that are trained whole into the state dict, from which PEFT takes them."""
    parameters = dict(model.named_parameters())
    for key in whole_keys(model, adapter_name).values():
        _check_gathered(key, parameters.get(key), state_dict)
        if key in state_dict and is_sharded(state_dict[key]) and isinstance(state_dict, MutableMapping):
            state_dict[key] = whole(state_dict[key])


def _check_gathered(key: str, parameter: Any, state_dict: Mapping[str, Tensor]) -> None:
    """Raise ValueError if DeepSpeed has partitioned a parameter, and the state dict lacks its numbers."""
    if parameter is None or not is_partitioned(parameter) or key not in state_dict:
        return
    if (found := state_dict[key].numel()) != parameter.ds_numel:
        raise ValueError(
            f"{key}: the parameter is partitioned by DeepSpeed's ZeRO stage 3, and the state dict has {found:,} of "
            f"its numbers, expected {parameter.ds_numel:,}. Save through the Trainer, with "
            "stage3_gather_16bit_weights_on_model_save in its DeepSpeed config, or pass "
            "state_dict=accelerator.get_state_dict(engine). Nothing was saved."
        )


def _check_indices(layer: EntryLayer, adapter_name: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError if a state dict has other entries than the layer itself, to which its values cannot belong."""
    for name in layer.index_names:
        own, found = getattr(layer, name)[adapter_name], tensors[name]
        if own.device.type == "meta":  # offloaded; the state dict alone holds them
            continue
        if found.shape != own.shape or not torch.equal(found.to(own), own):
            raise ValueError(
                f"{layer.module_path}: adapter {adapter_name!r} has other {name} in the state dict than in the model, "
                f"expected the same. {ONLY_PARAMETERS} Nothing was saved."
            )


def _check_tensors(layer: FPSLayer, adapter_name: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless a layer's tensors are valid.

    Args:
        layer: has the adapter.
        adapter_name: name of the adapter.
        tensors: of the state dict, by name, as a whole. Only those of a sharded layer are checked here; of other
            layers, the tensors in the layer itself.
    """
    if not layer.is_sharded(adapter_name):
        layer.check_tensors(adapter_name)
        if isinstance(layer, EntryLayer):
            layer.check_computed(adapter_name)
            _check_indices(layer, adapter_name, tensors)
        return
    where = f"{layer.module_path}: adapter {adapter_name!r}"
    values, columns, counts = (tensors[name] for name in ("fps_values", "fps_columns", "fps_row_counts"))
    try:
        sizes = layer.sizes(adapter_name)
        check_entries(columns, counts, sizes.neurons, sizes.inputs, values)
    except StructureError as error:
        raise ValueError(f"{where}: {error}. Its tensors are damaged; nothing was saved.") from error
