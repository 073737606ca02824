"""Colours that differ for all kinds of colour vision, and the style of all pictures."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure


COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""The colours of Okabe and Ito without black, which references have, and yellow, which is faint on white."""
DASHES: tuple[Any, ...] = ("solid", (0, (4, 1.5)))
LINES = tuple((colour, dash) for dash in DASHES for colour in COLOURS)
"""Colour and line style of up to 12 curves."""
REFERENCE, GRID_COLOUR = "#666666", "#DDDDDD"
COLOUR_MAP = "cividis"
SMALL, NORMAL = 8, 9


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure with a layout without overlaps.

    Args:
        width: width in inches.
        height: height in inches.
    """
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def finish(axes: Axes, title: str, x: str, y: str) -> None:
    """Add title, labels and grid to a panel with curves or points.

    Args:
        axes: axes of the panel.
        title: title of the panel.
        x: label of the horizontal axis.
        y: label of the vertical axis.
    """
    axes.set_title(title, fontsize=NORMAL, loc="left")
    axes.set_xlabel(x, fontsize=NORMAL)
    axes.set_ylabel(y, fontsize=NORMAL)
    axes.tick_params(labelsize=SMALL)
    axes.grid(color=GRID_COLOUR, linewidth=0.6)
    axes.set_axisbelow(True)
