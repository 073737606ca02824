"""Parameters of tests whose full product would run one path many times."""

from collections.abc import Iterable
from typing import Any


def pairwise(first: Iterable[Any], second: Iterable[Any], *others: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Every pair of the first two, and with each of their values every value of the others.

    The first two are the longest. Two of the others are not paired with each other.
    """
    ones, twos, rest = list(first), list(second), [list(values) for values in others]
    assert all(len(values) <= min(len(ones), len(twos)) for values in rest)
    return [
        (one, two, *(values[(i + j) % len(values)] for values in rest))
        for i, one in enumerate(ones)
        for j, two in enumerate(twos)
    ]


def in_turn(cases: Iterable[Any], *groups: Iterable[Any]) -> list[tuple[Any, Any]]:
    """Every case with one value of each group, taken in turn."""
    held, ways = list(cases), [list(group) for group in groups]
    return [(case, way[number % len(way)]) for way in ways for number, case in enumerate(held)]
