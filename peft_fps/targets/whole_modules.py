"""Modules that an adapter trains whole and saves (`modules_to_save`): which, and PEFT's wrappers around just these."""

import copy
import warnings
from typing import Any

from peft import TaskType
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from peft_fps.base.head import Head
from peft_fps.base.module_names import LISTS, all_names, bare, named_outside
from peft_fps.config import FPSConfig
from peft_fps.targets.whole_checks import check_trainable_whole, remedy_for


NAMED_BY_PEFT = {
    TaskType.SEQ_CLS: ["classifier", "score"],
    TaskType.TOKEN_CLS: ["classifier", "score"],
    TaskType.QUESTION_ANS: ["qa_outputs"],
}


def with_whole_head(model: nn.Module, config: FPSConfig, head: list[str]) -> list[str] | None:
    """Return the config's `modules_to_save`. Names that PEFT wrote for the task get the rest of the head added.

    PEFT looks for ends of names. A module of the head is added only if no module outside the head ends in its name.

    Args:
        model: base model, with or without other adapters.
        config: of the new adapter.
        head: full names of the modules of the model's head.
    """
    names = config.modules_to_save
    if config.record is not None or not names or names != NAMED_BY_PEFT.get(config.task_type):  # type: ignore[call-overload]
        return names
    modules = [name for name, _ in named_outside(model)]
    rest = [name for name in head if not _inside(name, [found for found in modules if found.endswith(tuple(names))])]
    return names + [name for name in rest if not any(m.endswith(name) and m not in head for m in modules)]


def whole_modules(model: nn.Module, config: FPSConfig, head: list[str]) -> list[str]:
    """Return the full names of the modules that `modules_to_save` names. A shared module has all its names.

    The name of a module of the head means that module. Another name means every module whose path ends in it, behind a
    dot; with a record, only those of which the adapter has tensors. A list of modules stands for its members.

    Args:
        model: base model, with or without other adapters.
        config: of the adapter.
        head: full names of the modules of the model's head.

    Raises:
        ValueError: a name is no module's, or is that of a module that cannot be trained whole.
    """
    modules = dict(named_outside(model))
    names = list(config.modules_to_save or ())
    saved = [] if config.record is None else list(config.record.whole_tensors or ())
    exact = [name for name in names if name in modules and (_holds(name, saved) if saved else name in head)]
    others = [key for key in saved if not _inside(key, exact)]
    found = list(exact)
    for name in names:
        ends = [path for path in modules if f".{path}".endswith(f".{name}")]
        if not ends and name not in NAMED_BY_PEFT.get(config.task_type, ()):  # type: ignore[call-overload]
            raise ValueError(
                f"modules_to_save names {name!r}, expected the path, or the end of the path behind a dot, of a module "
                f"of the {type(model).__name__}. {remedy_for(config)}"
            )
        kept = [path for path in ends if _holds(path, others)]
        found += kept if kept or name in exact else ends
    for path in found:
        if outer := next((other for other in found if path.startswith(f"{other}.")), None):
            raise ValueError(
                f"{path} and {outer}, in which it lies, are both to be trained whole (modules_to_save="
                f"{config.modules_to_save}), expected one of them. {remedy_for(config)}"
            )
    while lists := [name for name in found if isinstance(modules[name], LISTS)]:
        members = [f"{name}.{key}" for name in lists for key, _ in modules[name].named_children()]
        found = [name for name in found if name not in lists] + members
    named = all_names(model, found)
    for path in named:
        check_trainable_whole(model, path, config)
    return named


def warn_of_untrained_head(head: Head, config: FPSConfig, adapted: list[str], whole: list[str]) -> None:
    """Warn of parts of a new head that are neither adapted nor trained whole, unless `modules_to_save` is `[]`.

    Args:
        head: of the base model.
        config: of the new adapter. One with a record gets no warning.
        adapted: paths of the modules that will be adapted.
        whole: paths of the modules that will be trained whole.
    """
    if config.record is not None or config.modules_to_save == []:
        return
    frozen = [name for name in head.modules if not _inside(name, whole) and not _holds(name, adapted + whole)]
    if frozen:
        warnings.warn(
            f"{_listed(frozen)}: part of the model's output head, which modules_to_save={config.modules_to_save} does "
            "not name. It stays as it is, random if it is new. Train it with modules_to_save="
            f"{[*(config.modules_to_save or []), *frozen]}.",
            stacklevel=2,
        )
    if head.parameters:
        warnings.warn(
            f"{_listed(head.parameters)}: parameters of the model's output head that no layer holds, which "
            "modules_to_save cannot train, and an adapter file does not keep. They stay as they are, random if they "
            "are new. Load a model that has them trained, or move them into a module of their own.",
            stacklevel=2,
        )


def warn_of_shared_weights(model: nn.Module, config: FPSConfig, whole: list[str]) -> None:
    """Warn of modules that share a weight with one that is trained whole, and will not follow it.

    Args:
        model: base model, with or without other adapters.
        config: of the new adapter. One with a record gets no warning.
        whole: paths of the modules that will be trained whole.
    """
    if config.record is not None:
        return
    holders: dict[int, list[str]] = {}
    for path, module in named_outside(model):
        for parameter in bare(module).parameters(recurse=False):
            holders.setdefault(id(parameter), []).append(path)
    for path in whole:
        tensors = {id(parameter) for parameter in bare(model.get_submodule(path)).parameters()}
        others = [name for key in tensors for name in holders.get(key, ()) if not _inside(name, whole)]
        if others:
            warnings.warn(
                f"{path}, which is trained whole (modules_to_save), shares a weight with {_listed(sorted(others))} "
                "(tied weights). These keep the frozen weight and do not follow what is trained. If it is an "
                "embedding, name it in target_modules instead: its changes count wherever its weight is used.",
                stacklevel=2,
            )


def wrap_whole(model: nn.Module, names: list[str], adapter_name: str, *, inference_mode: bool, activate: bool) -> None:
    """Wrap modules, and give each a copy that the adapter trains. Tensors that modules share, their copies share too.

    Args:
        model: base model.
        names: full names of the modules.
        adapter_name: name of the adapter.
        inference_mode: the copies are not to be trained.
        activate: the copies are in use at once.
    """
    originals: dict[str, nn.Module] = {}
    wrappers: dict[str, Any] = {}
    for name in names:
        parent_name, _, own = name.rpartition(".")
        wrapper = model.get_submodule(name)
        if isinstance(wrapper, ModulesToSaveWrapper):
            wrapper.update(adapter_name)
            wrapper.set_adapter(wrapper.active_adapter, inference_mode=inference_mode)
        else:
            wrapper = ModulesToSaveWrapper(wrapper, adapter_name)
            wrapper.set_adapter([adapter_name] if activate else [], inference_mode=inference_mode)
            setattr(model.get_submodule(parent_name), own, wrapper)
        wrappers[name], originals[name] = wrapper, wrapper.original_module
    held = [id(p) for module in {id(m): m for m in originals.values()}.values() for p in module.parameters()]
    if len(set(held)) < len(held) or len({id(module) for module in originals.values()}) < len(originals):
        copies = copy.deepcopy(originals)
        for name, wrapper in wrappers.items():
            trained = next(wrapper.modules_to_save[adapter_name].parameters()).requires_grad
            wrapper.modules_to_save[adapter_name] = copies[name].requires_grad_(trained)


def _inside(name: str, modules: list[str]) -> bool:
    """Return whether a name is one of some modules, or lies inside one of them."""
    return name in modules or name.startswith(tuple(f"{module}." for module in modules))


def _holds(name: str, modules: list[str]) -> bool:
    """Return whether the module of a name is one of some modules, or holds one of them."""
    return any(module == name or module.startswith(f"{name}.") for module in modules)


def _listed(names: list[str]) -> str:
    """Return the first three names, and how many more there are, for a warning."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
