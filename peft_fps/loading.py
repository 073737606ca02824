"""Between PEFT's state dicts and the layers: encode on saving, check everything on loading."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from peft_fps.adapter_state import AdapterState
from peft_fps.adapters import FPSLayer
from peft_fps.buffers import buffer_digests, thaw_statistics
from peft_fps.card import SavedAdapter
from peft_fps.checkpoint import (
    PEFT_PREFIX,
    REMEDY,
    TENSORS,
    Expected,
    check_adapter_tensors,
    check_whole_modules,
    decode,
    encode,
    no_entries,
    tensors_digest,
)
from peft_fps.checkpoint.record import AdapterRecord
from peft_fps.compiled import plain_name
from peft_fps.config import FPSConfig
from peft_fps.entry_layer import EntryLayer
from peft_fps.inputs import unwatch_producers, watch_producers
from peft_fps.lookup import base_model, fps_layers
from peft_fps.norms import Norm
from peft_fps.planning import fingerprint_of
from peft_fps.renames import current_names
from peft_fps.selection.module_sizes import ModuleSizes
from peft_fps.sharded import is_sharded
from peft_fps.sparse import StructureError, check_entries
from peft_fps.targets import PREFIX


def saved_state(
    model: nn.Module, config: FPSConfig, adapter_name: str, state_dict: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the adapter's tensors as they go to disk, by model key (with the adapter's name).

    The config gets the record of what is saved, which its `save_pretrained` writes next.

    Raises:
        ValueError: the adapter's tensors are not valid, so that no file is written that could not be loaded.
    """
    result: dict[str, Tensor] = {}
    allocation: dict[str, ModuleSizes] = {}
    state = AdapterState()
    for full_name, layer in fps_layers(model).items():
        if not layer.carries(adapter_name):
            continue
        keys = {name: f"{full_name.removeprefix('_fsdp_wrapped_module.')}.{name}.{adapter_name}" for name in TENSORS}
        held = {name: state_dict[key] for name, key in keys.items() if key in state_dict}
        if isinstance(layer, Norm):
            held |= no_entries(held["fps_bias"])
        _check_held(layer, adapter_name, held)
        state = layer.fps_state[adapter_name]
        sizes = allocation[layer.module_path] = layer.sizes(adapter_name)
        result |= {keys[name]: encode(name, tensor, sizes.inputs) for name, tensor in held.items()}
    _warn_of_changed_buffers(model, adapter_name, state)
    wholes = (plain_name(key) for key in _whole_modules(model, adapter_name))
    record = AdapterRecord(
        allocation=allocation,
        calibration=state.calibration,
        # that of all targets was taken when the adapter was added
        base_fingerprint=(
            fingerprint_of(base_model(model), allocation) if state.unreached else state.base_fingerprint
        ),
        whole_tensors=tuple(sorted(key.removeprefix(PEFT_PREFIX) for key in wholes)),
        tensors_sha256=tensors_digest(
            {plain_name(key.removesuffix(f".{adapter_name}")): held for key, held in result.items()}
        ),
    )
    # several adapters may share one config object, so each hands over its own record just before it is saved
    config.to_save = SavedAdapter(record, state.base_parameters, state.evaluation)
    return result


def _warn_of_changed_buffers(model: nn.Module, adapter_name: str, state: AdapterState) -> None:
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


def _check_held(layer: FPSLayer, adapter_name: str, held: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless a layer's tensors can be saved; of a sharded layer only those that were gathered."""
    if not any(is_sharded(parameter) for parameter in layer.adapter_parameters(adapter_name)):
        layer.check_tensors(adapter_name)
        return
    where = f"{layer.module_path}: adapter {adapter_name!r}"
    if any(is_sharded(tensor) for tensor in held.values()):
        raise ValueError(
            f"{where} has its tensors sharded between processes (DTensors), expected whole ones to save. Gather a "
            "full state dict (accelerator.get_state_dict does) and pass it as state_dict=. Nothing was changed."
        )
    values, columns, counts = (held[name] for name in ("fps_values", "fps_columns", "fps_row_counts"))
    try:
        sizes = layer.sizes(adapter_name)
        check_entries(columns, counts, sizes.neurons, sizes.inputs, values)
    except StructureError as error:
        raise ValueError(f"{where}: {error}. Its tensors are damaged; nothing was saved.") from error


def load_state(
    model: nn.Module, config: FPSConfig, adapter_name: str, state_dict: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Check the tensors of an adapter file and return them by model key, ready to be copied.

    If anything is wrong, an adapter that was added to the model only to be loaded is taken out again.

    Raises:
        ValueError: names the module, what was found, what was expected and what to do.
    """
    layers = {name: layer for name, layer in fps_layers(model).items() if adapter_name in layer.fps_state}
    by_path = {layer.module_path: (name, layer) for name, layer in layers.items()}
    # other granularities fix only the total; the split over modules is the file's
    free = config.granularity not in ("neuron", "layer")
    expected = {path: _expected(layer, adapter_name) for path, (_, layer) in by_path.items()}
    try:
        modules, others = _split(model, state_dict)
        absent = [] if config.record is not None or not modules else [path for path in expected if path not in modules]
        carrying = {path for path, (_, layer) in by_path.items() if layer.carries(adapter_name)}
        if config.record is None and modules.keys() != carrying and modules.keys() <= expected.keys():
            expected, free = _as_reached(absent, modules, by_path, adapter_name), False
        check_adapter_tensors(modules, expected, total_only=free)
        current = model.state_dict()
        check_whole_modules(others, {key: current[key] for key in _whole_modules(model, adapter_name).values()})
    except ValueError:
        _withdraw(model, adapter_name)
        raise
    result = dict(others)
    if absent:
        warnings.warn(
            f"The adapter file holds nothing for {len(absent)} of {len(by_path)} modules, as a calibration leaves it "
            f"that did not reach them; they will not be trained: {', '.join(absent)}.",
            stacklevel=2,
        )
    for path in absent:
        by_path[path][1].leave_out(adapter_name)
    for path, tensors in modules.items():
        full_name, layer = by_path[path]
        if isinstance(layer, EntryLayer):
            layer.resize(adapter_name, tensors["fps_columns"].numel())
        layer.resize_bias(adapter_name, layer.neurons)
        layer.fps_state[adapter_name].unreached.discard(path)
        layer.fps_state[adapter_name].selected = True
        layer.fps_state[adapter_name].before = None
        for name in layer.adapter_layer_names:
            if name in tensors:  # never narrower than the file
                parameter = getattr(layer, name)[adapter_name]
                parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, tensors[name].dtype))
        for name in layer.tensor_names():
            if name in tensors:
                result[f"{full_name}.{name}.{adapter_name}"] = decode(name, tensors[name])
    return result


def _split(
    model: nn.Module, state_dict: Mapping[str, Tensor]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Split a checkpoint into sparse tensors by module path, and the rest by key."""
    modules: dict[str, dict[str, Tensor]] = {}
    others = {}
    for key, tensor in state_dict.items():
        path, _, name = key.removeprefix(PEFT_PREFIX).rpartition(".")
        if name.startswith(PREFIX):
            if name in modules.setdefault(path, {}):
                raise ValueError(f"{path}: the adapter file holds {name} twice, expected it once. {REMEDY}")
            modules[path][name] = tensor
        else:
            others[key] = tensor
    return current_names(base_model(model), modules), others


def _as_reached(
    absent: Sequence[str],
    modules: Mapping[str, Mapping[str, Tensor]],
    layers: Mapping[str, tuple[str, FPSLayer]],
    adapter_name: str,
) -> dict[str, Expected]:
    """Return what is expected of a file whose calibration has reached other modules than the model's adapter has.

    Modules may have other numbers of entries than the model's: together no more than the model has, biases included.
    """
    planned = sum(p.numel() for _, layer in layers.values() for p in layer.adapter_parameters(adapter_name))
    trained = sum(
        tensor.numel()
        for tensors in modules.values()
        for name, tensor in tensors.items()
        if name in ("fps_values", "fps_bias")
    )
    if trained > planned:
        raise ValueError(
            f"The adapter file has {trained:,} entries and biases in {len(modules)} of {len(layers)} modules, "
            f"expected at most the {planned:,} that this adapter has. {REMEDY}"
        )
    return {
        path: replace(_expected(layer, adapter_name), entries=modules[path]["fps_columns"].numel())
        for path, (_, layer) in layers.items()
        if path not in absent and "fps_columns" in modules[path]
    }


def _expected(layer: FPSLayer, adapter_name: str) -> Expected:
    return Expected(**asdict(layer.sizes(adapter_name)), bias=adapter_name in layer.fps_bias)


def _whole_modules(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """Tensors of `modules_to_save` and the like: key in a checkpoint (without the adapter's name) to model key."""
    return {
        f"{name.removeprefix('_fsdp_wrapped_module.')}.{key}": f"{name.removeprefix('_fsdp_wrapped_module.')}.{stored}"
        for name, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
        for key, stored in module.adapter_state_dict_load_map(adapter_name).items()
    }


def _withdraw(model: nn.Module, adapter_name: str) -> None:
    """Take an adapter out that was injected from a saved config and never loaded; others stay as they are."""
    layers = {name: layer for name, layer in fps_layers(model).items() if adapter_name in layer.fps_state}
    if not any(layer.awaits_loading(adapter_name) for layer in layers.values()):
        return
    before = next(iter(layers.values())).fps_state[adapter_name].before
    if before is not None:
        before.restore()  # first, so that what is taken out is active nowhere
    for name, layer in layers.items():
        if set(layer.fps_state) == {adapter_name}:
            _replace(model, name, layer.base_layer)
        else:
            layer.delete_adapter(adapter_name)
    for name, module in list(model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            if set(module.modules_to_save) == {adapter_name}:
                _replace(model, name, module.original_module)
            else:
                del module.modules_to_save[adapter_name]
                module._adapters.discard(adapter_name)
    left = fps_layers(model)
    paths = {layer.module_path for layer in left.values()}
    for module in model.modules():
        if isinstance(module, BaseTuner):
            module.targeted_module_names = [name for name in module.targeted_module_names if name in paths]
        configs = module.__dict__.get("peft_config")
        if isinstance(configs, dict):  # one dict that tuner and base model share
            configs.pop(adapter_name, None)
            if not configs:
                del module.peft_config
    if left:
        watch_producers(model)  # norms that were wrapped noted their outputs themselves
    else:
        unwatch_producers(model)
        thaw_statistics(model)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)
