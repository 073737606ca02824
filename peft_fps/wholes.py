"""Modules that an adapter trains whole (`modules_to_save`): what a config may name, checked before anything changes.

PEFT takes every module whose path ends with one of the names, at a dot or not, and wraps one after the other when the
sparse layers are in place already. What it then trips over, or wraps although nobody meant it, is refused here.
"""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from peft_fps.checkpoint import TENSORS
from peft_fps.config import FPSConfig


ADDED_BY_PEFT = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Names that PEFT enters for a `task_type`, whether or not a model has them."""

WITHIN_LAYERS = ("base_layer", *TENSORS)
"""Modules that a layer has once it carries an adapter."""

CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)
"""Modules that cannot be called."""


def whole_modules(model: nn.Module, config: FPSConfig) -> list[str]:
    """Return the paths of the modules that the adapter will train whole, those that PEFT will find.

    Args:
        model: base model, with or without other adapters.
        config: of the new adapter.

    Raises:
        ValueError: a name is no module's, or is that of a module that cannot be trained whole.
    """
    names = config.modules_to_save or []
    paths = {path: module for path, module in model.named_modules(remove_duplicate=False) if path.endswith((*names,))}
    for name in names:
        exact = any(f".{path}".endswith(f".{name}") and path == _place(model, path) for path in paths)
        if not exact and name not in ADDED_BY_PEFT.get(config.task_type or "", ()):
            raise ValueError(
                f"modules_to_save names {name!r}, expected the path, or the end of the path behind a dot, of a module "
                f"of the {type(model).__name__}. {_advice(config)}"
            )
    found = dict.fromkeys(_place(model, path) for path in paths)
    for path in found:
        _check(model, path, config)
    for path in found:
        if outer := next((other for other in found if path.startswith(f"{other}.")), None):
            raise ValueError(
                f"{path} and {outer}, in which it lies, are both to be trained whole (modules_to_save={names}), "
                f"expected one of them. {_advice(config)}"
            )
    return list(found)


def check_whole_modules_apart(
    model: nn.Module, config: FPSConfig, wholes: Sequence[str], targets: Sequence[str]
) -> None:
    """Raise ValueError unless modules trained whole and targeted modules are apart.

    Args:
        model: base model, with or without other adapters.
        config: of the new adapter.
        wholes: from `whole_modules`.
        targets: paths of the modules that will have entries.
    """
    for target in targets:
        for name in config.modules_to_save or ():
            for part in WITHIN_LAYERS:
                if f"{target}.{part}".endswith(name):
                    raise ValueError(
                        f"modules_to_save names {name!r}, which is also the end of {target}.{part}, a part of the "
                        f"adapter's own, expected names of modules of the {type(model).__name__} alone. "
                        f"{_advice(config)}"
                    )
        if wrapper := _around(model, target, AuxiliaryTrainingWrapper):
            raise ValueError(
                f"{target}: another adapter trains {wrapper} whole (modules_to_save), expected a target outside of "
                "it: the same weights cannot change in both ways. Leave it out with exclude_modules, or name "
                "target_modules."
            )
    if config.from_file:
        for name in config.allocation or ():
            if path := next((path for path in wholes if f"{name}.".startswith(f"{path}.")), None):
                raise ValueError(
                    f"{name}: the adapter's config has entries for it, and trains {path} whole (modules_to_save="
                    f"{config.modules_to_save}), expected one of the two. {_advice(config)}"
                )
        return
    names = tuple(f".{name}" for name in config.modules_to_save or ())
    if unmeant := [path for path in wholes if not f".{path}".endswith(names)]:
        warnings.warn(
            f"{', '.join(unmeant)}: trained and saved whole as well, since the path ends with one of "
            f"modules_to_save={config.modules_to_save}, which PEFT compares without regard to dots. Name longer paths "
            "if that is not meant.",
            stacklevel=2,
        )


def check_whole_tensors(model: nn.Module, config: FPSConfig, wholes: Sequence[str]) -> None:
    """Raise ValueError unless a config from a file lists just the tensors of its modules that are trained whole."""
    if not config.from_file:
        return
    expected = whole_tensors(model, wholes)
    listed = {name.replace("_orig_mod.", "") for name in config.whole_tensors or ()}
    if different := sorted(listed ^ {name.replace("_orig_mod.", "") for name in expected}):
        found = "lacks" if different[0] not in listed else "lists"
        names = config.modules_to_save
        wanted = f"the tensors of the modules that modules_to_save={names} names" if names else "only sparse tensors"
        raise ValueError(
            f"{different[0]}: whole_tensors of the adapter's config {found} this tensor ({len(different)} such), "
            f"expected {wanted}. {_advice(config)}"
        )


def whole_tensors(model: nn.Module, wholes: Sequence[str]) -> list[str]:
    """Return the names under which the tensors of modules that are trained whole are saved."""
    return [f"{path}.{name}" for path in wholes for name in _original(model.get_submodule(path)).state_dict()]


def _check(model: nn.Module, path: str, config: FPSConfig) -> None:
    """Raise ValueError if PEFT cannot wrap the module, or would wrap a part of an adapter."""
    module = model.get_submodule(path)
    found = None
    if around := _around(model, path, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        found = f"a part of an adapter in {around}"
    elif isinstance(module, BaseTunerLayer):
        found = "a layer that carries sparse changes of another adapter"
    elif isinstance(module, CONTAINERS):
        found = f"a {type(module).__name__}, which only holds other modules"
    elif not isinstance(module, ModulesToSaveWrapper):
        inside = (
            name for name, part in module.named_modules() if isinstance(part, BaseTunerLayer | ModulesToSaveWrapper)
        )
        if (first := next(inside, None)) is not None:
            found = f"a module with a part that another adapter changes, {first}"
    if found:
        raise ValueError(
            f"{path} is to be trained whole (modules_to_save={config.modules_to_save}), but is {found}, expected a "
            f"module of the base model that no adapter has changed. {_advice(config)}"
        )


def _place(model: nn.Module, path: str) -> str:
    """Return where an adapter's copy of a module that is trained whole belongs: PEFT takes one for the other."""
    owner, _, _ = path.rpartition(".modules_to_save.")
    wrapped = owner and path.count(".") == owner.count(".") + 2
    return owner if wrapped and isinstance(model.get_submodule(owner), ModulesToSaveWrapper) else path


def _around(model: nn.Module, path: str, kinds: Any) -> str | None:
    """Return the path of a module of one of the kinds within which the path lies, None if there is none."""
    return next((outer for outer in _ancestors(path) if isinstance(model.get_submodule(outer), kinds)), None)


def _ancestors(path: str) -> Iterator[str]:
    parts = path.split(".")
    return (".".join(parts[:length]) for length in range(1, len(parts)))


def _original(module: nn.Module) -> nn.Module:
    return module.original_module if isinstance(module, ModulesToSaveWrapper) else module


def _advice(config: FPSConfig) -> str:
    if config.from_file:
        return "The config is damaged or belongs to another model; fetch or save the adapter again."
    return "Pass modules_to_save with other names, or [] for none."
