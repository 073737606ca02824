"""Heat maps: matrices as coloured cells."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from peft_fps.plots.grid import Grid, shortened
from peft_fps.plots.looks import COLOUR_MAP, NORMAL, SMALL


CELL_WIDTH, CELL_HEIGHT = 0.42, 0.32
"""Size of a cell in inches."""
WIDEST = 15.0
"""Largest width of a picture in inches."""
MARGINS = 4.2
"""Width of labels and colour bar beside the cells in inches."""
LEVEL_CHARACTER = 0.07
"""Width of a character of a horizontal label in inches."""
MOST_LABELS = 40
"""Largest number of labels of columns."""
NARROWEST_WRITTEN = 0.38
"""Smallest width in inches of a cell with its number in it."""
BAR_WIDTH = 0.2
"""Width of the colour bar in inches."""


def heat_map_size(grid: Grid) -> tuple[float, float]:
    """Return width and height of a heat map of the grid in inches, labels and colour bar included."""
    width = MARGINS + CELL_WIDTH * len(grid.blocks)
    return min(max(width, 7.0), WIDEST), 1.3 + CELL_HEIGHT * len(grid.types)


def draw_heat_map(
    axes: Axes,
    matrix: NDArray[np.float64],
    columns: Sequence[str],
    rows: Sequence[str],
    unit: str,
    highest: float,
    cell: tuple[float, float],
) -> None:
    """Draw a matrix with a colour bar. Cells show their numbers if they are wide enough.

    Args:
        axes: axes to draw in.
        matrix: `(rows, columns)`, not negative. NaN leaves a cell empty.
        columns: labels of columns. With more than `MOST_LABELS` columns, some have no label.
        rows: labels of rows. Only the end of a long label is shown.
        unit: label of the colour bar.
        highest: value at the end of the colours, at least the largest value.
        cell: approximate width and height of a cell in inches.
    """
    axes.set_facecolor("#EEEEEE")
    image = axes.imshow(matrix, cmap=COLOUR_MAP, vmin=0.0, vmax=highest, aspect="auto", interpolation="nearest")
    _label(axes, columns, rows, cell[0])
    if cell[0] >= NARROWEST_WRITTEN:
        decimals = 0 if highest >= 100 else 1 if highest >= 10 else 2
        for row, column in zip(*np.nonzero(~np.isnan(matrix)), strict=True):
            colour = "black" if matrix[row, column] > 0.55 * highest else "white"
            text = f"{matrix[row, column]:.{decimals}f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=6.5, color=colour)
    figure = axes.get_figure()
    assert figure is not None
    aspect = max(5.0, cell[1] * len(rows) / BAR_WIDTH)
    bar = figure.colorbar(image, ax=axes, pad=0.01, fraction=0.08, aspect=aspect)
    bar.set_label(unit, fontsize=SMALL)
    bar.ax.tick_params(labelsize=SMALL)


def _label(axes: Axes, columns: Sequence[str], rows: Sequence[str], width: float) -> None:
    """Draw the labels, and white lines between the cells. Long labels of columns are vertical.

    Args:
        axes: axes with the heat map.
        columns: labels of columns.
        rows: labels of rows.
        width: width of a cell in inches.
    """
    step = -(-len(columns) // MOST_LABELS)
    ticks = range(0, len(columns), step)
    written = [shortened(columns[tick], 24) for tick in ticks]
    axes.set_xticks(ticks, written, fontsize=SMALL)
    if max(map(len, written)) * LEVEL_CHARACTER > step * width:
        axes.tick_params(axis="x", labelrotation=90)
    axes.set_yticks(range(len(rows)), [shortened(row) for row in rows], fontsize=SMALL)
    axes.set_xticks(np.arange(len(columns) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(rows) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=0.8)
    axes.tick_params(which="minor", length=0)
    axes.tick_params(which="major", length=2)
    for spine in axes.spines.values():
        spine.set_visible(False)


def draw_grid(axes: Axes, grid: Grid, matrix: NDArray[np.float64], unit: str, title: str, highest: float) -> None:
    """Draw a number for each cell of a grid as a heat map.

    Args:
        axes: axes to draw in.
        grid: types and blocks, which label the cells.
        matrix: `(types, blocks)`, as `grid.matrix` returns it.
        unit: label of the colour bar.
        title: title of the panel.
        highest: value at the end of the colours, at least the largest value.
    """
    width = (heat_map_size(grid)[0] - MARGINS) / len(grid.blocks) + 0.02
    draw_heat_map(axes, matrix, grid.block_labels, grid.types, unit, highest, (width, CELL_HEIGHT))
    axes.set_title(title, fontsize=NORMAL, loc="left")
    axes.set_xlabel(grid.block_axis, fontsize=NORMAL)
    axes.set_ylabel("type of module", fontsize=NORMAL)
