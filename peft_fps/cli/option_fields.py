"""Commands whose options are the fields of a dataclass."""

import inspect
from collections.abc import Callable, Collection
from dataclasses import MISSING, fields
from typing import Any, TypeVar, get_type_hints


Command = TypeVar("Command", bound=Callable[..., None])


def options_of(kind: type, without: Collection[str] = (), **instead: Any) -> Callable[[Command], Command]:
    """Make a decorator that gives a command the fields of a dataclass as options, in place of its `**options`.

    They have the names, types, descriptions and defaults of the fields, and follow the command's own parameters that
    have no default.

    Args:
        kind: the dataclass; its fields are annotated with `typer.Option`.
        without: names of fields that are no options of the command.
        instead: by the name of a field, another annotation.
    """
    annotations = get_type_hints(kind, include_extras=True) | instead
    shared = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=annotations[field.name],
        )
        for field in fields(kind)
        if field.name not in without
    ]

    def with_options(command: Command) -> Command:
        own = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in inspect.signature(command, eval_str=True).parameters.values()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        required = [parameter for parameter in own if parameter.default is inspect.Parameter.empty]
        parameters = [*required, *shared, *(parameter for parameter in own if parameter not in required)]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return with_options
