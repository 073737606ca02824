"""Pictures of a training run."""

from collections.abc import Iterable, Mapping
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from peft_fps.plots.looks import COLOURS, NORMAL, SMALL, finish, new_figure


LOSSES = {"loss": "training", "eval_loss": "validation"}


def plot_training(log_history: Iterable[Mapping[str, Any]]) -> Figure:
    """Draw losses over epochs, and accuracies on validation data if the log has any.

    Args:
        log_history: `trainer.state.log_history` of a transformers `Trainer`. The picture shows records with `epoch`
            and one of `loss`, `eval_loss`, and accuracies from 0 to 1, whose names begin with `eval_` and end with
            `accuracy`. Other records do not count.

    Raises:
        ValueError: no record has a loss or an accuracy.
    """
    records = [record for record in log_history if "epoch" in record]
    names = dict.fromkeys(key for record in records for key in record)
    accuracies = [name for name in names if name.startswith("eval_") and name.endswith("accuracy")]
    losses = [name for name in LOSSES if name in names]
    panels = [panel for panel, drawn in (("loss", losses), ("accuracy", accuracies)) if drawn]
    if not panels:
        raise ValueError(
            "log_history has no record with an epoch and a loss or an eval_accuracy, expected what "
            "trainer.state.log_history holds after training. There is nothing to draw."
        )
    figure = new_figure(4.2 * len(panels) + 0.8, 3.4)
    axes = dict(zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True))
    for panel, drawn in (("loss", losses), ("accuracy", accuracies)):
        for name, colour in zip(drawn, COLOURS, strict=False):
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
