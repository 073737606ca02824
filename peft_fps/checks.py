"""Checks of single values of a config; every error names the field, what was found and what is allowed."""

import re
from typing import Any


FORMAT_VERSION = 1


def check_version(version: Any) -> None:
    """Raise ValueError unless this package can read an adapter of that format version."""
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ValueError(f"format_version is {version!r}, expected an integer of at least 1.")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"format_version is {version}, expected at most {FORMAT_VERSION}: the adapter was written by a newer "
            "peft_fps. Upgrade with `pip install -U peft-fps`."
        )


def check_number(name: str, value: Any, upper: float | None = None, optional: bool = True) -> None:
    """Raise TypeError or ValueError unless the value is a finite number from 0 to `upper`, or None where optional."""
    allowed = f"between 0 and {upper:g}" if upper is not None else "of at least 0"
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r} of type {type(value).__name__}, expected a number {allowed}.")
    if not 0 <= value <= (float("inf") if upper is None else upper) or value == float("inf"):
        raise ValueError(f"{name} is {value!r}, expected a finite number {allowed}.")


def check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless the value is one of those allowed."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, allowed))}.")


def check_type(name: str, value: Any, expected: type, description: str) -> None:
    """Raise TypeError unless the value is of the expected type."""
    if not isinstance(value, expected):
        raise TypeError(f"{name} is {value!r} of type {type(value).__name__}, expected {description}.")


def check_names(name: str, value: Any, types: Any) -> None:
    """Raise TypeError unless the value is None, a non-empty name where `types` has strings, or a list of names."""
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


def check_unreached(name: str, record: dict[str, Any]) -> None:
    """Raise ValueError unless what a calibration's record says of modules without input is a list of names."""
    unreached = record.get("unreached", [])
    if not isinstance(unreached, list) or not all(isinstance(path, str) for path in unreached):
        raise ValueError(f"{name} has unreached={unreached!r}, expected a list of module names.")


def check_allocation(allocation: Any) -> None:
    """Raise unless the value is None or an allocation: neurons, inputs and entries by module."""
    if allocation is None:
        return
    check_type("allocation", allocation, dict, "None or what an adapter_config.json holds")
    for module, sizes in allocation.items():
        where = f"allocation[{module!r}]"
        if (
            not isinstance(module, str)
            or not isinstance(sizes, dict)
            or set(sizes) != {"neurons", "inputs", "entries"}
        ):
            raise ValueError(f"{where} is {sizes!r}, expected the integers 'neurons', 'inputs' and 'entries'.")
        if any(isinstance(size, bool) or not isinstance(size, int) or size < 0 for size in sizes.values()):
            raise ValueError(f"{where} is {sizes!r}, expected integers of at least 0.")
        if sizes["entries"] > sizes["neurons"] * sizes["inputs"]:
            raise ValueError(f"{where} is {sizes!r}, expected at most neurons times inputs entries.")
