"""What options of several commands have in common: types, limits, checks and panels of `--help`.

The fields of the dataclasses of options are annotated with these, and the commands are made from the fields. So every
option has one description: name, type, default, limits and help.
"""

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

import typer


DATA, SELECTION, TRAINING, OUTPUT = "Model and data", "What is trained", "Training", "Output"
"""Panels of `--help`."""

AUTO = "auto"
"""The learning rate that is to be found by trials."""

Precision = Literal["fp32", "bf16"]
"""Number format of the arithmetic in training."""


def described(help: str, panel: str, metavar: str | None = None, **limits: Any) -> Any:
    """Return the description of an option.

    Args:
        help: what it does and what holds without it.
        panel: of `--help`.
        metavar: what stands for its value in `--help`, `"N"` for example.
        limits: further arguments of `typer.Option`: `min`, `max`, `callback`.
    """
    return typer.Option(help=help, rich_help_panel=panel, metavar=metavar, **limits)


def count(help: str, panel: str, least: int = 1) -> Any:
    """Return the description of a number of things, `least` or more."""
    return described(help, panel, "N", min=least)


def pixels(help: str, panel: str, least: int = 1) -> Any:
    """Return the description of the height and width of images, `least` pixels or more."""
    return described(help, panel, "PIXELS", min=least)


def positive_rate(help: str, panel: str) -> Any:
    """Return the description of a learning rate, which is positive and finite."""
    return described(help, panel, "RATE", callback=positive)


def rate_or_auto(text: str) -> float | str:
    """Return the learning rate that an option says, or `"auto"`.

    Raises:
        typer.BadParameter: it is neither `auto` nor a positive number.
    """
    if text == AUTO:
        return AUTO
    try:
        rate = float(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is neither a number nor {AUTO}.") from error
    positive(rate)
    return rate


def seed_number(help: str, panel: str) -> Any:
    """Return the description of a seed, 0 to 2^32 - 1, as NumPy takes it."""
    return described(help, panel, "N", min=0, max=2**32 - 1)


def positive(value: float | None) -> float | None:
    """Return a number that is None, or positive and finite.

    Raises:
        typer.BadParameter: it is something else.
    """
    if value is not None and not 0 < value < math.inf:
        raise typer.BadParameter(f"{value} is not a positive number.")
    return value


def fraction(value: float | None) -> float | None:
    """Return a number that is None, or at least 0 and below 1.

    Raises:
        typer.BadParameter: it is something else.
    """
    if value is not None and not 0 <= value < 1:
        raise typer.BadParameter(f"{value} is not at least 0 and below 1.")
    return value


def one_of(names: tuple[str, ...], refusal: str) -> Callable[[str | None], str | None]:
    """Return a check that lets None and the names through.

    Args:
        names: values that are allowed.
        refusal: message for all others, with `{value!r}` where the value stands.
    """

    def check(value: str | None) -> str | None:
        if value is not None and value not in names:
            raise typer.BadParameter(refusal.format(value=value))
        return value

    return check


ImageColumn = Annotated[
    str | None, described("Column with the images. Default: found by its type.", DATA, metavar="NAME")
]
LabelColumn = Annotated[
    str | None,
    described(
        "Column with the classes (class labels or integers). Default: found by its name or type.",
        DATA,
        metavar="NAME",
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace the results of an earlier run in --output.", rich_help_panel=OUTPUT),
]
