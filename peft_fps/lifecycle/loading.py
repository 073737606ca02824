"""Loading an adapter's file into a model through PEFT: everything is checked, then PEFT copies the tensors."""

import warnings
from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from peft_fps.base.renamed_modules import current_names
from peft_fps.base.sharded import reshard, sharded_like
from peft_fps.checkpoint import FILE_REMEDY, TRAINED, Contents, Expected, check_contents, decode
from peft_fps.checkpoint.expected_contents import expected_module, state_dict_path, whole_keys, without_left_out
from peft_fps.config import FPSConfig
from peft_fps.layers.entry_layer import EntryLayer
from peft_fps.layers.fps_layer import FPSLayer
from peft_fps.layers.lookup import base_model, fps_layers, target_layers
from peft_fps.lifecycle.entry_allocation import entries_of_reached
from peft_fps.lifecycle.merge_whole import check_unmerged
from peft_fps.lifecycle.withdrawal import withdraw_adapter


def load_state(
    model: nn.Module, config: FPSConfig, adapter_name: str, state_dict: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Check the tensors of an adapter file, make room for them in the layers, and return them for PEFT to copy.

    Args:
        model: has the adapter.
        config: of the adapter.
        adapter_name: name of the adapter.
        state_dict: tensors of the file by key. PEFT has given those of modules that are trained whole their keys in
            the model's state dict already.

    Returns:
        The tensors by model key.

    Raises:
        ValueError: names module and tensor, what was found, what was expected and what to do. An adapter that was
            added to the model only for this file is taken out again.
    """
    reshard(model)
    full_names = {layer.module_path: state_dict_path(name) for name, layer in fps_layers(model).items()}
    layers = target_layers(model, adapter_name)
    wholes = whole_keys(model, adapter_name)
    names = {key: name for name, key in wholes.items()}
    check_unmerged(layers, adapter_name, "load a file into")
    _check_token_blocks(config, layers, adapter_name)
    try:
        contents = Contents.of((names.get(key, key), tensor) for key, tensor in state_dict.items())
        contents = replace(contents, modules=current_names(base_model(model), contents.modules))
        expected = _expected(base_model(model), config, adapter_name, layers, contents)
        present = model.state_dict()
        check_contents(
            contents,
            expected,
            {name: present[key] for name, key in wholes.items()},
            total_only=_split_is_free(config, adapter_name, layers),
        )
    except ValueError:
        withdraw_adapter(model, adapter_name)
        raise
    contents = replace(contents, modules=without_left_out(contents.modules, layers, adapter_name))
    _check_room(layers, expected, adapter_name, contents)
    _leave_out([layer for path, layer in layers.items() if path not in expected], adapter_name, len(layers))
    result = {wholes[name]: tensor for name, tensor in contents.wholes.items()}
    for path, tensors in contents.modules.items():
        _make_room(layers[path], adapter_name, tensors)
        for name in layers[path].tensor_names():
            if name in tensors:
                result[f"{full_names[path]}.{name}.{adapter_name}"] = decode(name, tensors[name])
    return {key: sharded_like(tensor, present[key]) if key in present else tensor for key, tensor in result.items()}


def _check_room(
    layers: Mapping[str, FPSLayer], expected: Mapping[str, Expected], adapter_name: str, contents: Contents
) -> None:
    """Raise ValueError if the file needs other sizes or a wider dtype in a layer than those it was sharded with."""
    for path, layer in layers.items():
        if not layer.is_sharded(adapter_name):
            continue
        tensors = contents.modules.get(path, {})
        entries = expected[path].entries if path in expected else 0
        found, dtype = layer.sizes(adapter_name).entries, layer.adapter_parameters(adapter_name)[0].dtype
        trained = [tensors[name].dtype for name in TRAINED if name in tensors]
        wider = [kind for kind in trained if torch.promote_types(kind, dtype) != dtype]
        others = bool(tensors) and ("fps_bias" in tensors) != (adapter_name in layer.fps_bias)
        if entries != found or (path in expected) != layer.carries(adapter_name) or wider or others:
            raise ValueError(
                f"{path}: the adapter file has {entries:,} entries in {trained or 'no dtype'}, expected the {found:,} "
                f"in {dtype} with which the model was sharded, and bias deltas in the same modules. Load the adapter "
                "before the model is sharded. Nothing was changed."
            )


def _check_token_blocks(config: FPSConfig, layers: Mapping[str, FPSLayer], adapter_name: str) -> None:
    """Raise ValueError if an adapter is to load tensors whose blocks that select tokens were chosen elsewhere.

    PEFT reads no config when it loads into an adapter that is there, and the tensors do not say.
    """
    chosen = config.token_keep_rate is None or config.token_blocks is not None or config.record is not None
    if not chosen and not all(layer.fps_state[adapter_name].selected for layer in layers.values()):
        raise ValueError(
            f"token_blocks is None, and adapter {adapter_name!r} is not calibrated, expected the indices of the "
            "blocks that select tokens, which an adapter's tensors do not say. Make the adapter with "
            "token_blocks=[...], as selecting_blocks in the saved adapter_config.json names them. Nothing was loaded."
        )


def _split_is_free(config: FPSConfig, adapter_name: str, layers: Mapping[str, FPSLayer]) -> bool:
    """Return whether the file says how the entries are split over modules.

    The config that came with the file says it of an adapter that awaits its first file. An adapter that has tensors
    already may load a file of another selection. Granularities other than `"neuron"` and `"layer"` fix only the total.
    """
    awaiting = any(layer.awaits_loading(adapter_name) for layer in layers.values())
    return config.granularity not in ("neuron", "layer") and not awaiting


def _numbers(layers: Mapping[str, FPSLayer], adapter_name: str) -> int:
    """Return how many numbers an adapter trains in some layers."""
    return sum(p.numel() for layer in layers.values() for p in layer.adapter_parameters(adapter_name))


def _numbers_of_reached(
    base: nn.Module, config: FPSConfig, layers: Mapping[str, FPSLayer], adapter_name: str, reached: Collection[str]
) -> int:
    """Return how many numbers an adapter would train after a calibration that reaches these modules; 0 if none can.

    It may be more than before a calibration: what whole numbers of entries leave of the budget depends on the modules.

    Args:
        base: base model.
        config: of the adapter.
        layers: all that the adapter targets, by path.
        adapter_name: name of the adapter.
        reached: paths of the modules.
    """
    try:
        entries = entries_of_reached(base, config, layers, adapter_name, reached)
    except ValueError:  # the budget does not fit these modules
        return 0
    trained = [layers[path] for path in reached]
    biases = sum(layer.neurons for layer in trained if adapter_name in layer.fps_bias)
    return sum(entries.values()) + biases + sum(layer.threshold(adapter_name) is not None for layer in trained)


def _expected(
    base: nn.Module, config: FPSConfig, adapter_name: str, layers: Mapping[str, FPSLayer], contents: Contents
) -> dict[str, Expected]:
    """Return what is expected of a file, by module path.

    These are the modules that the adapter has, with their numbers of entries. An adapter that was not built from a
    saved config may also load a file whose calibration has reached other modules, or that has other inert biases, with
    other numbers of entries, if it has no more entries and bias deltas in total than this adapter has, or would have
    after a calibration that reaches the file's modules. Inert ones do not count.

    Raises:
        ValueError: the file has more entries and bias deltas than the adapter's budget allows.
    """
    carrying = {path: layer for path, layer in layers.items() if layer.carries(adapter_name)}
    modules = contents.modules
    inert = {path for path in modules if path in layers and layers[path].has_inert_bias(adapter_name)}
    held = without_left_out(modules, layers, adapter_name)
    other_biases = any(("fps_bias" in held[path]) != (adapter_name in layers[path].fps_bias) for path in inert)
    others = modules.keys() != carrying.keys() or other_biases
    if config.record is not None or not (modules and others and modules.keys() <= layers.keys()):
        return {
            path: expected_module(layer, adapter_name, layer.sizes(adapter_name).entries)
            for path, layer in carrying.items()
        }
    most = max(_numbers(layers, adapter_name), _numbers_of_reached(base, config, layers, adapter_name, modules))
    trained = sum(
        tensors[name].numel()
        for path, tensors in modules.items()
        for name in TRAINED
        if name in tensors and not (name == "fps_bias" and path in inert)
    )
    if trained > most:
        raise ValueError(
            f"The adapter file has {trained:,} entries and biases in {len(modules)} of {len(layers)} modules, "
            f"expected at most the {most:,} that the budget of this adapter allows. {FILE_REMEDY}"
        )
    entries = {path: tensors["fps_columns"].numel() for path, tensors in modules.items() if "fps_columns" in tensors}
    return {path: expected_module(layers[path], adapter_name, entries.get(path, 0)) for path in modules}


def _leave_out(layers: list[FPSLayer], adapter_name: str, targets: int) -> None:
    """Let the adapter hold nothing in the layers for which the file holds nothing, and warn of those that are new."""
    new = [layer.module_path for layer in layers if layer.carries(adapter_name)]
    if new:
        warnings.warn(
            f"The adapter file holds nothing for {len(new)} of {targets} modules, as a calibration leaves it that did "
            f"not reach them; they will not be trained: {', '.join(new)}.",
            stacklevel=3,
        )
    for layer in layers:
        layer.leave_out(adapter_name)


def _make_room(layer: FPSLayer, adapter_name: str, tensors: Mapping[str, Tensor]) -> None:
    """Give the adapter's tensors in a layer the sizes of the file's, and a dtype that loses no digit of them."""
    if isinstance(layer, EntryLayer):
        layer.resize(adapter_name, tensors["fps_columns"].numel())
        layer.hold_inert_bias(adapter_name, "fps_bias" in tensors)
    layer.resize_bias(adapter_name, layer.neurons)
    state = layer.fps_state[adapter_name]
    state.unreached.discard(layer.module_path)
    state.selected, state.before = True, None
    for name in layer.adapter_layer_names:
        if name in tensors and not layer.is_sharded(adapter_name):
            parameter = getattr(layer, name)[adapter_name]
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, tensors[name].dtype))
