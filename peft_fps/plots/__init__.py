"""Pictures of selections and of training, as matplotlib figures. They need the extra `plots`.

The functions do not use pyplot. So they need no display and change no global state. `figure.savefig("selection.png")`
saves a figure. A notebook shows a figure that ends a cell.

| module | subject |
|---|---|
| `selection`, `overlap`, `training` | the pictures |
| `reading` | how unevenly entries read the inputs of a module |
| `grid` | where modules stand in a picture |
| `heat_map` | matrices as coloured cells |
| `looks` | colours and style |
"""

try:
    import matplotlib  # noqa: F401 - the one check for all modules of this package
except ModuleNotFoundError as error:
    if error.name != "matplotlib":
        raise
    raise ImportError('Pictures need matplotlib, which is not installed: pip install "peft-fps[plots]".') from error

from peft_fps.plots.overlap import plot_overlap
from peft_fps.plots.selection import plot_selection
from peft_fps.plots.training import plot_training


__all__ = ["plot_overlap", "plot_selection", "plot_training"]
