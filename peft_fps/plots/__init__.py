"""Pictures of selections and of training, as matplotlib figures; they need the extra `plots`.

Figures are made without pyplot: no display is needed and no global state is touched. Save one with
`figure.savefig("selection.png")`; a notebook shows a figure that ends a cell.
"""

try:
    import matplotlib  # noqa: F401 - looked for here, so that what follows need not
except ModuleNotFoundError as error:
    if error.name != "matplotlib":
        raise
    raise ImportError('Pictures need matplotlib, which is not installed: pip install "peft-fps[plots]".') from error

from peft_fps.plots.overlap import plot_overlap
from peft_fps.plots.selection import plot_selection
from peft_fps.plots.training import plot_training


__all__ = ["plot_overlap", "plot_selection", "plot_training"]
