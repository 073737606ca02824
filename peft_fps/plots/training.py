"""A training run as a picture."""

from collections.abc import Iterable, Mapping
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from peft_fps.plots.looks import COLOURS, NORMAL, SMALL, finish, new_figure


LOSSES = {"loss": "training", "eval_loss": "validation"}


def plot_training(log_history: Iterable[Mapping[str, Any]]) -> Figure:
    """Draw losses, and accuracies on validation data if there are any, over epochs.

    Args:
        log_history: what a transformers `Trainer` keeps as `trainer.state.log_history`: records with `epoch` and
            `loss`, `eval_loss` or `eval_accuracy` (any name from `eval_` to `accuracy`, a share), others are left out.

    Raises:
        ValueError: no record tells a loss or an accuracy.
    """
    records = [record for record in log_history if "epoch" in record]
    names = dict.fromkeys(key for record in records for key in record)
    accuracies = [name for name in names if name.startswith("eval_") and name.endswith("accuracy")]
    losses = [name for name in LOSSES if name in names]
    panels = [panel for panel, held in (("loss", losses), ("accuracy", accuracies)) if held]
    if not panels:
        raise ValueError(
            "log_history has no record with an epoch and a loss or an eval_accuracy, expected what "
            "trainer.state.log_history holds after training. There is nothing to draw."
        )
    figure = new_figure(4.2 * len(panels) + 0.8, 3.4)
    axes = dict(zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True))
    for panel, held in (("loss", losses), ("accuracy", accuracies)):
        for name, colour in zip(held, COLOURS, strict=False):
            points = [(record["epoch"], record[name]) for record in records if name in record]
            label = LOSSES.get(name, name.removeprefix("eval_").replace("_", " "))
            axes[panel].plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3, label=label)
    if losses:
        finish(axes["loss"], "Loss", "epoch", "mean loss")
        axes["loss"].legend(fontsize=SMALL)
    if accuracies:
        finish(axes["accuracy"], "Accuracy on validation data", "epoch", "accuracy")
        axes["accuracy"].yaxis.set_major_formatter(PercentFormatter(xmax=1.0))
        if len(accuracies) > 1:
            axes["accuracy"].legend(fontsize=NORMAL)
    return figure
