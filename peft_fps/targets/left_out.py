"""The large weights that an adapter leaves as they are, and why."""

import re
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from peft_fps.base.head import Head
from peft_fps.base.module_names import bare
from peft_fps.config import FPSConfig
from peft_fps.layers.layer_types import entry_layer_class
from peft_fps.targets.base_parameters import base_parameters, named_base_modules
from peft_fps.targets.default_targets import in_wanted_block
from peft_fps.targets.obstacle import obstacle


LARGE = 0.01
"""Share of a model's parameters above which a weight is named, or the weights of one name in all blocks are."""

INDEX = re.compile(r"(?<=\.)\d+(?=\.)")
"""The number of a block in a path."""


@dataclass(frozen=True)
class LeftOut:
    """A weight that an adapter neither adapts nor trains whole, or all such weights of one name in several blocks.

    Attributes:
        name: full name of the parameter in the base model. Of several, with `*` for the numbers of blocks.
        share: their share of all parameters of the base model, from 0 to 1.
        members: full names of all of them.
    """

    name: str
    share: float
    members: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name} ({self.share:.1%})"


def left_out(model: nn.Module, covered: Collection[str]) -> tuple[LeftOut, ...]:
    """Return the weights above 1 % of a model that lie outside the covered modules, the largest first.

    Weights of one name in several blocks count together, unless they are vectors.

    Args:
        model: base model, with or without adapters.
        covered: paths of the modules that are adapted or trained whole. What lies inside them is covered too.
    """
    inside = tuple(f"{path}." for path in covered)
    # of packed weights and projections of attention the path is that of the parameter, or all but the end of it
    exact = {f"{path}{end}" for path in covered for end in ("", "_weight", "_bias")}
    parameters = dict(base_parameters(model))
    total = sum(parameter.numel() for parameter in parameters.values())
    sizes: dict[str, dict[str, int]] = {}
    for name, parameter in parameters.items():
        if not name.startswith(inside) and name not in exact:
            alike = INDEX.sub("*", name) if parameter.dim() > 1 else name
            sizes.setdefault(alike, {})[name] = parameter.numel()
    weights = [
        LeftOut(alike if len(found) > 1 else next(iter(found)), sum(found.values()) / total, tuple(found))
        for alike, found in sizes.items()
        if sum(found.values()) > LARGE * total
    ]
    return tuple(sorted(weights, key=lambda weight: -weight.share))


def warn_of_left_out(model: nn.Module, config: FPSConfig, head: Head, whole: Collection[str]) -> None:
    """Name the large weights that stay frozen because the targets were left to the default, and how to train them.

    Args:
        model: base model, with or without other adapters.
        config: of the new adapter. Without the blocks that `layers_to_transform` leaves out. There is no warning if it
            names its targets, or has a record.
        head: of the model.
        whole: paths of the modules that will be trained whole.
    """
    targets, parameters = config.filled_in.target_modules, config.filled_in.target_parameters
    if config.record is not None or targets is None or config.target_modules != targets:
        return
    modules = {name: bare(module) for name, module in named_base_modules(model)}
    advise = partial(_advice, modules, head, list(config.modules_to_save or ()))
    groups: dict[str, list[LeftOut]] = {}
    # a weight that is tied to a covered one has its other name
    for weight in left_out(model, [*targets, *(config.target_parameters or ()), *whole, *_unfit(modules, targets)]):
        owner, _, own = weight.members[0].rpartition(".")
        switched_off = parameters != config.target_parameters and _is_packed(modules[owner], own)
        if any(in_wanted_block(name, config) for name in weight.members) and not switched_off:
            groups.setdefault(advise(weight, owner, own), []).append(weight)
    if groups:
        kinds = "; ".join(f"{_listed(weights)}: {advice}" for advice, weights in groups.items())
        warnings.warn(
            f"Weights above 1 % of the model stay frozen under the default targets. {kinds}. Pass target_modules to "
            "choose layers without this warning.",
            stacklevel=2,
        )


def _unfit(modules: dict[str, nn.Module], targets: Collection[str]) -> list[str]:
    """Return the layers of a supported kind that cannot be adapted, which `default_targets` has named."""
    return [
        path
        for path, module in modules.items()
        if path not in targets and entry_layer_class(module) is not None and obstacle(module, certain=True)
    ]


def _is_packed(module: nn.Module, own: str) -> bool:
    """Return whether a parameter holds the weights of many experts: no vector, in a class that is named so."""
    parameter = module._parameters[own]
    return "expert" in type(module).__name__.lower() and parameter is not None and parameter.dim() > 1


def _advice(modules: dict[str, nn.Module], head: Head, saved: list[str], weight: LeftOut, owner: str, own: str) -> str:
    """Return why a weight is no default target, and the line that trains it.

    Args:
        modules: of the base model, by path.
        head: of the model.
        saved: modules that are trained whole in any case.
        weight: the weight, or several of one name.
        owner: path of the module that holds the first of them.
        own: name of the weight in it.
    """
    module: Any = modules[owner]
    # modules_to_save takes the end of a path
    path = owner if len(weight.members) == 1 else INDEX.sub("*", owner).rpartition("*.")[2]
    whole = f"train {'it' if path == owner else 'them'} whole with modules_to_save={[*saved, path]}"
    if isinstance(module, nn.Embedding):
        uses = sum(part._parameters.get(own) is module._parameters[own] for part in modules.values())
        named = "adapted only where target_modules names it"
        # a copy that is trained whole would not reach the other uses
        return f"an embedding, {named}" + (", for all modules that share its weight" if uses > 1 else f"; or {whole}")
    if owner in head.output_embeddings:
        return f"output embeddings; {whole}"
    parent = modules.get(owner.rpartition(".")[0])
    if isinstance(module, nn.MultiheadAttention) or isinstance(parent, nn.MultiheadAttention):
        return "read by torch.nn.MultiheadAttention without calling a layer; use an implementation with linear layers"
    if _is_packed(module, own):
        return "one tensor for the weights of many experts, in a form that FPS cannot adapt"
    if entry_layer_class(module) is not None:
        return f"outside the default targets; name {'it' if path == owner else 'them'} in target_modules, or {whole}"
    if owner and next(module.children(), None) is None:
        return f"of {type(module).__name__}, a kind that FPS does not adapt; {whole}"
    return f"of {type(module).__name__} itself, in no layer"


def _listed(weights: list[LeftOut]) -> str:
    """Return the first two weights, how many more there are, and the share of all together, for a warning."""
    more = f" and {len(weights) - 2} more ({sum(weight.share for weight in weights):.1%} together)"
    return ", ".join(map(str, weights[:2])) + (more if len(weights) > 2 else "")
