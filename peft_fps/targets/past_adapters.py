"""Modules that a model may use past an adapter, as its source and its attributes show before one is attached."""

import ast
import inspect
import textwrap
import warnings
from collections.abc import Callable, Collection, Iterator
from functools import cache
from typing import Any

from torch import nn


CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


@cache
def asked_classes(forward: Callable[..., Any]) -> frozenset[str]:
    """Return the names of the classes for which a forward asks with `isinstance`."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):  # made at run time
        return frozenset()
    asked = [
        node.args[1]
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance"
        if len(node.args) == 2
    ]
    parts = [part for each in asked for part in ast.walk(each)]
    return frozenset(
        part.attr if isinstance(part, ast.Attribute) else part.id
        for part in parts
        if isinstance(part, (ast.Attribute, ast.Name))
    )


def asking_owner(model: nn.Module, name: str) -> nn.Module | None:
    """Return the module whose forward asks for the class of one of its layers, None if none does.

    It gets another answer of an adapted layer, which is no `nn.Linear` but has one inside.

    Args:
        model: base model.
        name: path of the layer.
    """
    layer, path = model.get_submodule(name), name
    classes = {kind.__name__ for kind in type(layer).__mro__ if issubclass(kind, nn.Module)} - {"Module"}
    while path:
        path = path.rpartition(".")[0]
        owner = model.get_submodule(path)
        if not isinstance(owner, CONTAINERS):
            return owner if asked_classes(type(owner).forward) & classes else None
    return None


def warn_of_asked(model: nn.Module, names: Collection[str]) -> None:
    """Warn of targets of which the model asks for their class.

    Args:
        model: base model, with or without adapters.
        names: paths of the modules that a new adapter changes.
    """
    asking = {name: owner for name in _present(model, names) if (owner := asking_owner(model, name)) is not None}
    if asking:
        kinds = sorted({type(owner).__name__ for owner in asking.values()})
        warnings.warn(
            f"{', '.join(asking)}: the forward of {', '.join(kinds)} asks with isinstance for the layer's class, and "
            "an adapter gives it another one, so that the model may compute differently while the adapter is in "
            "it, also where it changes nothing. Compare outputs with and without the adapter, or leave the layer out "
            "with exclude_modules.",
            stacklevel=3,
        )


def warn_of_held_aside(model: nn.Module, names: Collection[str]) -> None:
    """Warn of targets that a module keeps in a plain list, tuple or dict besides, which goes on holding base layers.

    Args:
        model: base model, with or without adapters.
        names: paths of the modules that a new adapter changes.
    """
    targets = {id(model.get_submodule(name)): name for name in _present(model, names)}
    found = {
        targets[id(held)]: f"{path}.{attribute}".lstrip(".")
        for path, module in model.named_modules()
        for attribute, value in vars(module).items()
        if not attribute.startswith("_")
        for held in _items(value)
        if id(held) in targets
    }
    if found:
        places = sorted(set(found.values()))
        warnings.warn(
            f"{', '.join(found)}: the model keeps this layer in a plain list or dict besides ({', '.join(places)}). "
            "If it calls the layer from there, it goes past the adapter: the entries get no gradient, and count only "
            "once they are merged. Leave the layer out with exclude_modules, or let the model call its attribute.",
            stacklevel=3,
        )


def _items(value: Any) -> Iterator[nn.Module]:
    """Yield the modules in a plain container."""
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    yield from (each for each in values if isinstance(each, nn.Module))


def _present(model: nn.Module, names: Collection[str]) -> list[str]:
    """Return the names of modules; others are those of parameters and of projections."""
    known = {name for name, _ in model.named_modules()}
    return [name for name in names if name in known]
