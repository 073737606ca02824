"""Selection by sorting everything: slow, obvious, and written without the package."""

from collections.abc import Mapping
from fractions import Fraction


Scores = list[list[float]]
Selected = list[list[int]]
"""Sorted columns of every neuron."""


def best(scored: list[tuple[float, int]], count: int) -> list[int]:
    """Indices of the largest scores, ties to the lowest index."""
    return [index for _, index in sorted(scored, key=lambda pair: (-pair[0], pair[1]))[:count]]


def by_neuron(scores: Scores, entries: int) -> Selected:
    floor, extra = divmod(entries, len(scores))
    ranked = [best([(score, column) for column, score in enumerate(row)], len(row)) for row in scores]
    chosen = [row[:floor] for row in ranked]
    if extra:
        for row in best([(scores[i][ranked[i][floor]], i) for i in range(len(scores))], extra):
            chosen[row].append(ranked[row][floor])
    return [sorted(row) for row in chosen]


def by_layer(scores: Scores, entries: int) -> Selected:
    return by_model({"only": scores}, entries)["only"]


def by_model(layers: Mapping[str, Scores], entries: int) -> dict[str, Selected]:
    places = [
        (name, row, column)
        for name, scores in layers.items()
        for row, line in enumerate(scores)
        for column in range(len(line))
    ]
    scored = [(layers[name][row][column], i) for i, (name, row, column) in enumerate(places)]
    chosen: dict[str, Selected] = {name: [[] for _ in scores] for name, scores in layers.items()}
    for i in sorted(best(scored, entries)):
        name, row, column = places[i]
        chosen[name][row].append(column)
    return chosen


def whole_numbers(entries: list[int], sizes: list[tuple[int, int]]) -> list[int]:
    """One whole row at a time, twice along the layers, the second time with what is left over."""
    numbers, purse = [0] * len(sizes), 0
    for income in (entries, [0] * len(sizes)):
        for i, (size, count) in enumerate(sizes):
            purse += income[i]
            while purse >= size and numbers[i] < count:
                numbers[i] += 1
                purse -= size
    return numbers


def by_whole(given_layers: Mapping[str, tuple[Scores, int]], granularity: str, order: str) -> dict[str, Selected]:
    """Whole rows or columns by the sums of their scores; scores and number of entries by layer."""
    tables = [
        scores if granularity == "row" else list(zip(*scores, strict=True)) for scores, _ in given_layers.values()
    ]
    sizes = [(len(table[0]), len(table)) for table in tables]
    numbers = whole_numbers([entries for _, entries in given_layers.values()], sizes)
    found = {}
    for (name, (scores, _)), table, number in zip(given_layers.items(), tables, numbers, strict=True):
        sign = 1 if order == "top" else -1
        sums = [sign * sum(map(Fraction, line)) for line in table]
        chosen = sorted(best([(total, i) for i, total in enumerate(sums)], number))
        every = list(range(len(scores[0])))
        found[name] = [every if i in chosen else [] for i in range(len(scores))]
        if granularity == "column":
            found[name] = [chosen] * len(scores)
    return found
