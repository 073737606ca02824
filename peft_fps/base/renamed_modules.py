"""Present names of modules that transformers has renamed since an adapter was saved.

transformers has a table of renames for checkpoints of base models. For instance,
`encoder.layer.0.attention.attention.query` of a ViT became `layers.0.attention.q_proj`. Adapters use the same table.
"""

import re
from collections.abc import Mapping
from typing import TypeVar

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from peft_fps.base.compiled import plain_name


Value = TypeVar("Value")


def current_names(model: nn.Module, named: Mapping[str, Value]) -> dict[str, Value]:
    """Return `named` with module paths of an older version of transformers replaced by those of `model`.

    Paths of modules and parameters that exist in the model stay, and so do those for which transformers has no present
    name.

    Args:
        model: base model, with or without adapters.
        named: anything by module path.
    """
    modules = {plain_name(name) for name, _ in (*model.named_modules(), *model.named_parameters())}
    if not isinstance(model, PreTrainedModel) or all(name in modules for name in named):
        return dict(named)
    renamed = {}
    for name, value in named.items():
        current = name if name in modules else _rename(model, name)
        # a name that is taken stays under its old name, to be refused as one that the model does not have
        renamed[current if current in modules and (current == name or current not in named) else name] = value
    return renamed


def _rename(model: PreTrainedModel, name: str) -> str:
    """Return the present name of a module path according to the table of transformers."""
    for conversion in get_model_conversion_mapping(model):
        if isinstance(conversion, WeightRenaming) and len(conversion.target_patterns) == 1:
            for old in conversion.source_patterns:
                name = re.sub(old, conversion.target_patterns[0], name)
    return name
