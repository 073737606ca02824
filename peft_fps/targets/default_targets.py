"""The modules that are adapted by default, and the norms that `bias="with_norms"` adds."""

import re
import warnings

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from peft_fps.base.attention import PROJECTIONS, has_projections
from peft_fps.base.head import Head
from peft_fps.config import FPSConfig
from peft_fps.layers.layer_types import entry_layer_class
from peft_fps.layers.norm import is_biased_norm
from peft_fps.targets.base_parameters import named_base_modules
from peft_fps.targets.obstacle import is_offloaded, obstacle
from peft_fps.targets.past_adapters import asking_owner


READ_UNCALLED = (
    "read without being called by an attention (nn.MultiheadAttention) of which no projection can be adapted: it is "
    "offloaded, has a forward of its own, or a tensor for each projection (kdim, vdim)"
)

ASKED = (
    "the forward of {} asks with isinstance for its class, expected a model that computes the same with an adapter, "
    "whose layers are of another class"
)


def default_targets(model: nn.Module, config: FPSConfig, head: Head) -> set[str]:
    """Return the names of all linear and convolutional layers outside the output head that can be adapted.

    `layers_to_transform` limits them to some blocks, as PEFT counts these: by the first number in a module's path, or
    by the number behind `layers_pattern`. Layers that cannot be adapted are left out with a warning.

    Embeddings are adapted only where they are named. In a language model they hold a large part of the weights and
    often are the output embeddings too, most of their rows belong to tokens that the data never holds, and published
    selections leave them frozen. `selection_report` names those that are left out.

    Args:
        model: base model, with or without adapters.
        config: gives `layers_to_transform` and `layers_pattern`.
        head: of the model.

    Raises:
        ValueError: there are such layers, and none of them can be adapted.
    """
    heads = head.left_out
    inside = tuple(f"{head}." for head in heads)
    # what other adapters train whole
    inside += tuple(f"{name}." for name, part in model.named_modules() if isinstance(part, AuxiliaryTrainingWrapper))
    attentions = {name: part for name, part in named_base_modules(model) if isinstance(part, nn.MultiheadAttention)}
    found = {
        name: module
        for name, module in named_base_modules(model)
        if entry_layer_class(module) is not None
        and not isinstance(module, nn.Embedding)
        and name not in heads
        and not name.startswith(inside)
        and in_wanted_block(name, config)
    }
    reasons = {
        name: READ_UNCALLED if name.rpartition(".")[0] in attentions else obstacle(module, certain=True)
        for name, module in found.items()
    }
    projections = {
        f"{name}.{own}"
        for name, part in attentions.items()
        if name and has_projections(part) and not f"{name}.".startswith(inside)
        if not (is_offloaded(part) or is_offloaded(part.out_proj))
        for own in PROJECTIONS
        if in_wanted_block(f"{name}.{own}", config)
    }
    asking = {name: owner for name in found if (owner := asking_owner(model, name)) is not None}
    reasons |= {name: reasons[name] or ASKED.format(type(owner).__name__) for name, owner in asking.items()}
    unfit = {name: why for name, why in reasons.items() if why and name not in projections}
    kinds = "; ".join(f"{name}: {why}" for name, why in _first_of_each(unfit).items())
    if unfit and len(unfit) == len(found) and not projections:
        raise ValueError(f"None of the {len(found)} layers of {type(model).__name__} can be adapted: {kinds}.")
    if unfit:
        warnings.warn(
            f"{len(unfit)} of {len(found)} layers are left out of the targets and stay frozen: {kinds}."
            f" All of them: {', '.join(unfit)}. Pass target_modules to choose layers without this warning.",
            stacklevel=2,
        )
    return found.keys() - unfit.keys() | projections


def _first_of_each(reasons: dict[str, str]) -> dict[str, str]:
    """Return the first module for each reason, by name."""
    first = {reason: name for name, reason in reversed(reasons.items())}
    return {name: reason for name, reason in reasons.items() if first[reason] == name}


def biased_norms(model: nn.Module, config: FPSConfig, head: Head) -> set[str]:
    """Return the names of all LayerNorms with a bias outside the output head, embedding normalisations included.

    `layers_to_transform` limits them to some blocks.

    Args:
        model: base model, with or without adapters.
        config: gives `layers_to_transform` and `layers_pattern`.
        head: of the model.
    """
    heads = head.left_out
    wholes = [name for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    inside = tuple(f"{head}." for head in [*heads, *wholes])
    return {
        name
        for name, module in named_base_modules(model)
        if is_biased_norm(module)
        and name
        and name not in heads
        and not name.startswith(inside)
        and in_wanted_block(name, config)
    }


def in_wanted_block(name: str, config: FPSConfig) -> bool:
    """Return whether a module path lies in a block of `layers_to_transform`. All do if the config names no blocks."""
    wanted, patterns = config.layers_to_transform, config.layers_pattern
    if wanted is None:
        return True
    lists = ["[^.]*"] if not patterns else [patterns] if isinstance(patterns, str) else patterns
    found = next((match for part in lists if (match := re.match(rf"(?:^|.*?\.){part}\.(\d+)\.", name))), None)
    return found is not None and int(found[1]) in ([wanted] if isinstance(wanted, int) else wanted)
