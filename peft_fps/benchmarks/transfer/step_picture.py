"""A picture of token selection: accuracy against the time of a training step, and against operations."""

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import mean

from peft_fps.benchmarks.transfer.arms import ARMS
from peft_fps.benchmarks.transfer.estimates import over_seeds
from peft_fps.benchmarks.transfer.transfer_tables import Results


MEASURED = {
    "lora": "lora",
    "fps-biases": "keep-1",
    **{f"keep-{rate:g}-fixed-biases": f"keep-{rate:g}" for rate in (0.9, 0.7, 0.5)},
}
"""Methods of the transfer table by the name that the row of token selection in the cost table has for them."""
BY_RULE = [f"keep-{rate:g}-biases" for rate in (0.9, 0.7, 0.5)]


def read_steps(path: Path) -> dict[str, float]:
    """Return the seconds of a step by method, from a cost.json that `peft-fps benchmark cost --rows tokens` wrote.

    Raises:
        ValueError: the file is not there, or has no such row.
    """
    try:
        step = json.loads(path.read_text(encoding="utf-8"))["rows"]["tokens"]["raw"]["step"]
        return {method: float(step[name]["median"]) for method, name in MEASURED.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--steps is {str(path)!r}, expected the cost.json of `peft-fps benchmark cost --rows tokens`; "
            f"{type(error).__name__}: {error}"
        ) from error


def draw_steps(results: Results, seconds: Mapping[str, float], path: Path) -> None:
    """Draw the mean accuracy of token selection beside LoRA and all patches, to a PNG file.

    Left: against the seconds of a training step as a share of LoRA's, with tokens selected in the same blocks for all
    tasks. Right: against the operations of the merged model's forward pass as a share of the base's, in these blocks
    and in those of the rule, which differ by task. Bars are standard errors over seeds.

    Args:
        results: of a run.
        seconds: of a step, by method.
        path: the file to write.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(11, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(canvas)
    left, right = canvas.subplots(1, 2, sharey=True)
    rows = {row[0]: row for row in results.of_share(results.tuned_share) if results.seeds(row)}
    for method in (*MEASURED, *BY_RULE):
        if method not in rows:
            continue
        reached = over_seeds(results.accuracies(rows[method]), results.tasks)
        operations = 1 + mean(record.operations for record in results.rows[rows[method]])
        style = {
            "yerr": 100 * (reached.error or 0.0),
            "marker": {"lora": "D", "fps-biases": "p"}.get(method, "o" if method in MEASURED else "^"),
            "color": "#E69F00" if method == "lora" else "#0072B2" if method in MEASURED else "#009E73",
            "linestyle": "",
            "markersize": 9,
            "capsize": 3,
            "label": ARMS[method].label,
        }
        if method in seconds:
            left.errorbar(seconds[method] / seconds["lora"], 100 * reached.mean, **style)
        right.errorbar(operations, 100 * reached.mean, **style)
        for axes, x in ((left, seconds.get(method, 0.0) / seconds["lora"]), (right, operations)):
            if method.startswith("keep") and x:
                rate = method.split("-")[1]
                axes.annotate(rate, (x, 100 * reached.mean), (6, 6), textcoords="offset points", fontsize=8)
    left.axvline(2 / 3, color="#999999", linestyle="--", linewidth=1)
    left.set_xlabel("time of a training step ÷ LoRA's; dashed: two thirds")
    right.set_xlabel("operations of a forward pass, merged ÷ base")
    left.set_ylabel(f"mean {results.split} accuracy, %")
    for axes in (left, right):
        axes.grid(color="#DDDDDD", linewidth=0.6, zorder=-1)
    if right.get_legend_handles_labels()[0]:
        right.legend(fontsize=7)
    canvas.savefig(path)
