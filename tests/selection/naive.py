"""Selection by sorting everything: slow, obvious, and written without the package."""

from collections.abc import Mapping


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
