"""Under which keys a checkpoint holds the tensors of a transformers model.

transformers renames the keys of a checkpoint while it loads it, and adds or drops the backbone's name before them. It
also joins, splits and transposes tensors, for instance those of experts. Such a tensor has no key of its own.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key


@dataclass(frozen=True)
class CheckpointKeys:
    """What of a checkpoint a model loads.

    Attributes:
        plain: key in the checkpoint of each tensor that is loaded as it is, by its name in the model's state dict.
        converted: by key, the names of the tensors that are made from a stored tensor, alone or with others.
    """

    plain: Mapping[str, str]
    converted: Mapping[str, frozenset[str]]


def checkpoint_keys(model: PreTrainedModel, stored: Iterable[str]) -> CheckpointKeys:
    """Find out which tensors of a model a checkpoint holds.

    The rules are those of `convert_and_load_state_dict_in_model` in transformers.

    Args:
        model: its tensors may be on the meta device.
        stored: all keys of the checkpoint. Those of other tensors are passed over, as on loading.

    Raises:
        ValueError: the checkpoint holds a tensor of the model twice.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    present, prefix = model.state_dict(), model.base_model_prefix
    plain: dict[str, str] = {}
    converted: dict[str, frozenset[str]] = {}
    for key in sorted(stored, key=dot_natural_key):  # some renamings go by what they have met before
        name, pattern = rename_source_key(key, renamings, converters, prefix, present)
        if name not in present and key in present:
            name, pattern = rename_source_key(key, [], [], prefix, present)
        if name not in present:
            continue
        if pattern is not None:
            first, *others = by_pattern[pattern].target_patterns
            converted[key] = frozenset({name, *(name.replace(first, other) for other in others)})
        elif name in plain:
            raise ValueError(f"{plain[name]} and {key} are both {name}")
        else:
            plain[name] = key
    return CheckpointKeys(plain, converted)
