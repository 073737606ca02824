"""Calls of a model whose arguments are noted by name before they run."""

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

from torch import nn
from transformers import PreTrainedModel


Note = Callable[[Mapping[str, Any], nn.Module], Callable[[], None]]
"""Takes the arguments of a call by name, and the model that is called. Returns what is to be done after the call."""


def note_calls(model: nn.Module, note: Note) -> Callable[[], None]:
    """Note the calls of a model from now on.

    Those of the outermost models of transformers in a model of another kind count too: it may make their masks itself.

    Args:
        model: whose calls are noted.
        note: is called before each of them.

    Returns:
        What ends it.
    """
    before = [(each, vars(each).get("forward")) for each in (model, *_inner_models(model))]
    for each, _ in before:
        # not a hook, because PEFT calls the forward of the base model without its hooks
        each.forward = _noting(each, each.forward, note)

    def end() -> None:
        for each, forward in before:
            vars(each).pop("forward", None)
            if forward is not None:
                each.forward = forward

    return end


def _noting(model: nn.Module, forward: Callable[..., Any], note: Note) -> Callable[..., Any]:
    """Return a forward that notes its arguments, with the items of a mapping that is the first or the only one."""
    names = list(inspect.signature(forward).parameters)

    @wraps(forward)
    def noting(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        nested = [value for value in given.values() if isinstance(value, Mapping)]
        alone = args[0] if args and isinstance(args[0], Mapping) else nested[0] if len(nested) == 1 else {}
        after = note({**given, **alone}, model)
        try:
            return forward(*args, **kwargs)
        finally:
            after()

    return noting


def _inner_models(model: nn.Module) -> list[nn.Module]:
    """Return the outermost models of transformers in a model of another kind."""
    if isinstance(model, PreTrainedModel):
        return []
    found: dict[str, nn.Module] = {}
    for name, part in model.named_modules():
        if isinstance(part, PreTrainedModel) and not name.startswith(tuple(f"{outer}." for outer in found)):
            found[name] = part
    return list(found.values())
