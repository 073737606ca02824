"""What a row of the benchmark found, beside what was aimed at."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peft_fps.benchmarks.cost.clock import Times


@dataclass(frozen=True)
class Figure:
    """One number.

    Attributes:
        what: what it is, for a table.
        value: the number.
        unit: `"×"` for a ratio, `"s"`, `"bytes"` per trained number, or `"weights"`, multiples of the largest weight.
        at_most: the target, where it is an upper bound.
        at_least: the target, where it is a lower bound.
    """

    what: str
    value: float
    unit: str = "×"
    at_most: float | None = None
    at_least: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the target is met, None where there is none."""
        if self.at_most is None and self.at_least is None:
            return None
        low = -float("inf") if self.at_least is None else self.at_least
        return low <= self.value <= (float("inf") if self.at_most is None else self.at_most)

    @property
    def target(self) -> str:
        """The target in words, empty where there is none."""
        bounds = (("≤", self.at_most), ("≥", self.at_least))
        return " ".join(f"{sign} {bound:g} {self.unit}" for sign, bound in bounds if bound is not None)

    def to_dict(self) -> dict[str, Any]:
        """Return the figure as plain data."""
        return {**vars(self), "met": self.met}


@dataclass(frozen=True)
class Row:
    """All figures of one kind of cost.

    Attributes:
        name: as in `--rows`.
        title: what was measured.
        figures: numbers for the table.
        raw: everything that they were computed from, plain data.
        skipped: what was not measured, and why.
    """

    name: str
    title: str
    figures: tuple[Figure, ...]
    raw: Mapping[str, Any] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the row as plain data."""
        return {**vars(self), "figures": [figure.to_dict() for figure in self.figures]}


def plain(times: Mapping[str, Times]) -> dict[str, Any]:
    """Return times by name as plain data."""
    return {name: found.to_dict() for name, found in times.items()}
