"""Colours that all kinds of colour vision tell apart, and what all pictures share."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure


COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's, without black, which is for references, and yellow, which is faint on white."""
DASHES: tuple[Any, ...] = ("solid", (0, (4, 1.5)))
LINES = tuple((colour, dash) for dash in DASHES for colour in COLOURS)
"""Colour and line style of up to 12 curves."""
REFERENCE, GRID_COLOUR = "#666666", "#DDDDDD"
COLOUR_MAP = "cividis"
SMALL, NORMAL = 8, 9


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of a size in inches, whose parts keep clear of each other."""
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def finish(axes: Axes, title: str, x: str, y: str) -> None:
    """Label a panel that shows curves or points."""
    axes.set_title(title, fontsize=NORMAL, loc="left")
    axes.set_xlabel(x, fontsize=NORMAL)
    axes.set_ylabel(y, fontsize=NORMAL)
    axes.tick_params(labelsize=SMALL)
    axes.grid(color=GRID_COLOUR, linewidth=0.6)
    axes.set_axisbelow(True)
