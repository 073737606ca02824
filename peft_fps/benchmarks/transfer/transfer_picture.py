"""Pictures of a run: accuracy against trained parameters, and against the memory that selection takes."""

from pathlib import Path
from statistics import mean, median

from peft_fps.benchmarks.tables import MIB
from peft_fps.benchmarks.transfer.arms import ARMS
from peft_fps.benchmarks.transfer.estimates import over_seeds
from peft_fps.benchmarks.transfer.transfer_tables import Results


# Okabe and Ito's colours, which all kinds of colour vision tell apart; shapes say the same
LOOKS = {
    "linear": ("#999999", "o"),
    "full": ("#000000", "s"),
    "bitfit": ("#56B4E9", "P"),
    "lora": ("#E69F00", "D"),
    "shira": ("#CC79A7", "v"),
    "supertuning": ("#F0E442", "^"),
    "random": ("#999999", "X"),
    "magnitude": ("#F0E442", "<"),
    "fps": ("#0072B2", "*"),
    "fps-biases": ("#0072B2", "p"),
    "gps": ("#D55E00", ">"),
    "fish-mask": ("#009E73", "h"),
}
"""Colour and marker of what is drawn: methods, and FPS as its config is by default; the rest is left to the tables."""


def draw(results: Results, path: Path) -> None:
    """Draw the mean accuracy of every method that has run on all tasks, to a PNG file.

    Left: against trained parameters, logarithmic, with standard errors over seeds; a dashed line for the linear head,
    which trains none of the backbone. Right: against the peak memory of selection, at the share where learning rates
    were chosen.

    Args:
        results: of a run.
        path: the file to write.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    canvas = Canvas(figsize=(11, 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(canvas)
    left, right = canvas.subplots(1, 2)
    for method, (color, marker) in LOOKS.items():
        rows = sorted(row for row in results.rows if row[0] == method and results.seeds(row))
        if not rows:
            continue
        reached = [over_seeds(results.accuracies(row), results.tasks) for row in rows]
        heights = [100 * estimate.mean for estimate in reached]
        errors = [100 * (estimate.error or 0.0) for estimate in reached]
        label = ARMS[method].label
        if method == "linear":
            left.axhline(heights[0], color=color, linestyle="--", linewidth=1, label=label)
            continue
        trained = [100 * mean(cell.trained / cell.backbone for cell in results.rows[row]) for row in rows]
        style = {"color": color, "marker": marker, "markersize": 9, "markeredgecolor": "black", "linewidth": 1}
        left.errorbar(trained, heights, yerr=errors, capsize=3, label=label, **style)
        for row, height, error in zip(rows, heights, errors, strict=True):
            # at one share alone, since the height would tell of the share otherwise
            if row[1] == results.tuned_share and method not in ("lora", "shira"):
                memory = median(record.bytes["select"] for record in results.rows[row]) / MIB
                right.errorbar(memory, height, yerr=error, capsize=3, label=label, **style | {"linestyle": ""})
    left.set_xscale("log")
    low, high = left.get_xlim()
    left.set_xlim(low / 1.5, high * 1.5)
    left.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    left.xaxis.set_minor_formatter(NullFormatter())
    left.set_xlabel("trained parameters, % of the backbone (head apart)")
    right.set_xlabel("peak memory of selection, MiB (0: no data needed)")
    for axes in (left, right):
        axes.set_ylabel(f"mean {results.split} accuracy, %")
        axes.grid(color="#DDDDDD", linewidth=0.6, zorder=-1)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)
    canvas.suptitle(f"{len(results.tasks)} tasks; bars: standard error over seeds", fontsize=9, x=0.01, ha="left")
    canvas.savefig(path)
