"""Pictures of the agreement of selections."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from peft_fps.plots.grid import arrange
from peft_fps.plots.heat_map import LEVEL_CHARACTER, draw_grid, draw_heat_map, heat_map_size
from peft_fps.plots.looks import NORMAL, new_figure
from peft_fps.saved_selection import Selection


UNIT = "Jaccard index of the entries"
CELL = 0.6
"""Width and height of a cell in inches."""


def plot_overlap(selections: Mapping[str, Selection]) -> Figure:
    """Draw the overlap of every two selections: the Jaccard index |A ∩ B| / |A ∪ B| of all their entries.

    Args:
        selections: two or more selections of the same modules, by the names that the picture shows.

    Raises:
        ValueError: there are fewer than two selections, or they are of different modules.
    """
    names = list(selections)
    if len(names) < 2:
        raise ValueError(f"selections has {len(names)} items, expected two or more to compare.")
    matrix = np.eye(len(names))
    for row, name in enumerate(names):
        for column, other in enumerate(names[:row]):
            try:
                overlap = selections[other].overlap(selections[name])
            except ValueError as error:
                raise ValueError(f"{other!r} and {name!r} cannot be compared: {error}") from error
            matrix[row, column] = matrix[column, row] = overlap.total
    side, label = max(CELL * len(names), 1.8), LEVEL_CHARACTER * min(max(map(len, names)), 34)
    figure = new_figure(side + label + 1.3, side + label + 0.6)
    axes = figure.add_subplot()
    draw_heat_map(axes, matrix, names, names, UNIT, 1.0, (side / len(names), side / len(names)))
    axes.set_title("Overlap of selections", fontsize=NORMAL, loc="left")
    return figure


def plot_module_overlap(counts: Mapping[str, tuple[int, int]], title: str) -> Figure:
    """Draw the Jaccard index of two selections in %, by transformer block and type of module.

    Args:
        counts: number of entries in both selections, and number of entries in at least one, by module path. The index
            of modules without entries is 100 %.
        title: title of the picture.

    Raises:
        ValueError: there are no modules.
    """
    if not counts:
        raise ValueError("counts has no modules, expected one at least. There is nothing to draw.")
    grid = arrange(counts)

    def index(paths: list[str]) -> float:
        both, either = (sum(counts[path][part] for path in paths) for part in (0, 1))
        return 100 * both / either if either else 100.0

    figure = new_figure(*heat_map_size(grid))
    draw_grid(figure.add_subplot(), grid, grid.matrix(index), "Jaccard index, %", title, 100.0)
    return figure
