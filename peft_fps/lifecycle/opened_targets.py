"""Targets at paths where the base model has no layer: parameters, and projections of attention modules."""

from collections.abc import Collection
from copy import copy
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, _ExcludedModule
from torch import nn

from peft_fps.base.attention import PROJECTIONS, has_projections
from peft_fps.base.opening import weight_at
from peft_fps.config import FPSConfig
from peft_fps.targets.base_parameters import named_base_modules
from peft_fps.targets.target_parameters import is_excluded, named_parameters


def names_path(config: FPSConfig, path: str) -> Any:
    """Return whether `target_modules` names a path: a bool, PEFT's match, or its mark of an excluded module."""
    by_names = copy(config)
    by_names.modules_to_save = None  # PEFT would leave out every module whose path holds such a name
    return BaseTuner._check_target_module_exists(by_names, path)


def opened_targets(
    model: nn.Module, config: FPSConfig, wholes: Collection[str], stored: Collection[str] | None
) -> tuple[list[str], list[str]]:
    """Return the paths of the targeted parameters and projections, and of those that `exclude_modules` leaves out.

    Args:
        model: base model, with or without adapters.
        config: of the adapter. A record in it decides.
        wholes: paths of the modules that are trained whole, which hold no target.
        stored: paths of the modules of which the file to be loaded has tensors. None if there is no such file.
    """
    listed = stored if stored is not None else None if config.record is None else config.record.allocation
    if listed is not None:
        return [path for path in listed if weight_at(model, path) is not None], []
    projections = [
        f"{name}.{own}".lstrip(".")
        for name, module in named_base_modules(model)
        if has_projections(module)
        for own in PROJECTIONS
    ]
    inside = tuple(f"{name}." for name in wholes)
    matched = {path: names_path(config, path) for path in projections}
    named = named_parameters(model, config) + [path for path, found in matched.items() if found]
    excluded = [path for path, found in matched.items() if isinstance(found, _ExcludedModule)]
    excluded += [path for path in named if is_excluded(path, config)]
    return [path for path in named if path not in excluded and not path.startswith(inside)], excluded
