"""Checks of single values of a config; every error names the field, what was found and what is allowed."""

import re
from typing import Any


def check_number(name: str, value: Any, upper: float | None = None, optional: bool = True) -> None:
    """Check that a value is a finite number from 0 to `upper`.

    Args:
        name: name of the field, for errors.
        value: its value.
        upper: largest value that is allowed. Default: None, no limit.
        optional: allow None. Default: True.

    Raises:
        TypeError: the value is no number.
        ValueError: the value is out of range or not finite.
    """
    allowed = f"between 0 and {upper:g}" if upper is not None else "of at least 0"
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r} of type {type(value).__name__}, expected a number {allowed}.")
    if not 0 <= value <= (float("inf") if upper is None else upper) or value == float("inf"):
        raise ValueError(f"{name} is {value!r}, expected a finite number {allowed}.")


def check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless the value is one of those allowed.

    Args:
        name: name of the field, for the error.
        value: its value.
        allowed: the words that are allowed.
    """
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, allowed))}.")


def check_type(name: str, value: Any, expected: type, description: str) -> None:
    """Raise TypeError unless the value is of the expected type.

    Args:
        name: name of the field, for the error.
        value: its value.
        expected: the type.
        description: what the error expects.
    """
    if not isinstance(value, expected):
        raise TypeError(f"{name} is {value!r} of type {type(value).__name__}, expected {description}.")


def check_names(name: str, value: Any, types: Any) -> None:
    """Raise TypeError unless the value is of one of the types, and no name is empty.

    Args:
        name: name of the field, for the error.
        value: its value: None, a name, or a list, set or tuple of names.
        types: union of the types that are allowed. A single name is allowed only if `str` is among them.
    """
    members = value if isinstance(value, (list, set, tuple)) else ()
    if not isinstance(value, types) or value == "" or any(not isinstance(item, str) or not item for item in members):
        kinds = "a name or a list of names" if isinstance("", types) else "a list of names"
        raise TypeError(f"{name} is {value!r}, expected None, {kinds} (strings that are not empty).")


def check_regex(name: str, pattern: str) -> None:
    """Raise ValueError unless the pattern is a regular expression."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:  # the last two: a huge count, a deep nesting
        raise ValueError(f"{name} holds {pattern!r}, expected a valid regular expression: {error}.") from error


def check_indices(name: str, value: Any) -> None:
    """Raise TypeError or ValueError unless the value is None or distinct indices, at least one, in a list or tuple."""
    if value is None:
        return
    wrong = not isinstance(value, (list, tuple)) or not value
    if wrong or any(isinstance(index, bool) or not isinstance(index, int) for index in value):
        raise TypeError(f"{name} is {value!r}, expected None or a list of indices, at least one.")
    if min(value) < 0 or len(set(value)) < len(value):
        raise ValueError(f"{name} is {value!r}, expected distinct indices of 0 or more.")
