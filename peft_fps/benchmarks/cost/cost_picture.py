"""A picture of memory against time."""

from pathlib import Path

from peft_fps.benchmarks.cost.cost_tables import NO_EVIDENCE, Result
from peft_fps.benchmarks.cost.methods import LORA, METHODS


# Okabe and Ito's colours, which all kinds of colour vision tell apart; shapes say the same
LOOKS = {
    "full": ("#000000", "s"),
    "masks": ("#D55E00", "X"),
    "lora": ("#E69F00", "D"),
    "shira": ("#CC79A7", "v"),
    "supertuning": ("#F0E442", "^"),
    "fps": ("#0072B2", "*"),
    "fps-pytorch": ("#0072B2", "o"),
    "fps-columns": ("#009E73", "P"),
    "fps-bfloat16": ("#009E73", "<"),
}
FLOOR = "#666666"
LABEL_GAP = 0.062
"""Smallest distance between the labels of two points, as a share of the picture's height."""


def draw(result: Result, path: Path) -> None:
    """Draw every method's peak memory against its time, both relative to LoRA, to a PNG file.

    Args:
        result: with the rows `step` and `memory`.
        path: the file to write.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    points = relative(result)
    canvas = Canvas(figsize=(9, 5.4), dpi=150, layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.add_subplot()
    floor = points.pop("floor")
    axes.axvline(floor[0], color=FLOOR, linestyle="--", linewidth=1, zorder=0)
    axes.axhline(floor[1], color=FLOOR, linestyle="--", linewidth=1, zorder=0)
    every = [*points.values(), floor]
    for axis, limit in ((0, axes.set_xlim), (1, axes.set_ylim)):
        values = [point[axis] for point in every]
        margin = 0.08 * (max(values) - min(values)) + 0.01
        limit(min(values) - margin, max(values) + margin)
    low, high = axes.get_ylim()
    heights = spread({name: (point[1] - low) / (high - low) for name, point in points.items()}, LABEL_GAP)
    for name, (time, memory) in points.items():
        color, marker = LOOKS[name]
        axes.scatter(time, memory, s=90, color=color, marker=marker, edgecolors="black", linewidths=0.6, zorder=3)
        axes.annotate(
            METHODS[name].label,
            xy=(time, memory),
            xytext=(1.03, heights[name]),
            textcoords="axes fraction",
            verticalalignment="center",
            fontsize=9,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.7, "relpos": (0.0, 0.5), "shrinkB": 4},
        )
    axes.set_xlabel(f"seconds of a training step ÷ {LORA}\n(dashed: frozen floor, gradients of inputs only)")
    axes.set_ylabel(f"peak bytes of a training step ÷ {LORA}")
    axes.grid(color="#DDDDDD", linewidth=0.6, zorder=-1)
    axes.set_title(_title(result), fontsize=9, loc="left")
    canvas.savefig(path)


def relative(result: Result) -> dict[str, tuple[float, float]]:
    """Return each method's step time and peak memory, both ÷ LoRA's."""
    step, memory = result.row("step"), result.row("memory")
    assert step is not None
    assert memory is not None
    seconds, held = step.raw["seconds"], memory.raw["bytes"]
    return {
        name: (seconds[name]["median"] / seconds["lora"]["median"], held[name]["peak"] / held["lora"]["peak"])
        for name in METHODS
    }


def spread(heights: dict[str, float], gap: float) -> dict[str, float]:
    """Move heights between 0 and 1 apart until no two are closer than `gap`, in their order and below 1."""
    order = sorted(heights, key=heights.__getitem__)
    placed: dict[str, float] = {}
    lowest = 0.0
    for name in order:
        placed[name] = max(heights[name], lowest)
        lowest = placed[name] + gap
    highest = 1.0
    for name in reversed(order):
        placed[name] = min(placed[name], highest)
        highest = placed[name] - gap
    return placed


def _title(result: Result) -> str:
    """Return what was measured where, and that a quick run is no evidence."""
    load = result.workload
    where = result.machine.get("gpu") or f"{load.threads} threads of {result.machine['processor']}"
    title = f"{load.model}, batch {load.batch_size}, {load.precision}, {where}"
    return f"{title}\n{NO_EVIDENCE}" if load.quick else title
