"""Results of `peft-fps benchmark cost` as plain data, as tables and as Markdown."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from peft_fps.benchmarks.cost.figures import Figure, Row
from peft_fps.benchmarks.cost.methods import METHODS
from peft_fps.benchmarks.cost.workload import Workload
from peft_fps.benchmarks.tables import MIB, TextTable, titled_markdown


LEGEND = (
    "step: forward, backward, AdamW, zeroing the gradients. peak: tensors during a step beyond those before it. "
    "saved: by the forward pass for backward, parameters left out. at rest: all tensors between steps. frozen floor: "
    "nothing trained but the head, gradients of inputs only. LoRA: r=16."
)
NO_EVIDENCE = "A quick run on a cut-down model: it shows that everything works and is no evidence."
VERDICTS = {True: "yes", False: "NO", None: ""}


@dataclass(frozen=True)
class Result:
    """Everything that one run of the benchmark found.

    Attributes:
        workload: what was measured.
        machine: processor, system and versions.
        date: day of the run, ISO 8601.
        parameters: number of the model's parameters.
        rows: what was found.
    """

    workload: Workload
    machine: Mapping[str, str]
    date: str
    parameters: int
    rows: tuple[Row, ...]

    def row(self, name: str) -> Row | None:
        """Return the row of that name, None if it was not measured."""
        return next((row for row in self.rows if row.name == name), None)

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain data; times are in seconds."""
        return {
            "evidence": not self.workload.quick,
            "date": self.date,
            "workload": asdict(self.workload),
            "parameters": self.parameters,
            "machine": dict(self.machine),
            "rows": {row.name: row.to_dict() for row in self.rows},
        }

    @property
    def heading(self) -> str:
        """One line on what was measured where."""
        load = self.workload
        where = self.machine.get("gpu") or f"{self.machine['processor']}, {load.threads} threads"
        cut = " cut down," if load.quick else ""
        malloc = ", the system's malloc" if load.system_malloc else ""
        what = f"{load.model},{cut} {self.parameters:,} parameters, {load.precision}"
        if [row.name for row in self.rows] == ["grid"]:
            what = "several models"
        return f"{what}, {where}{malloc}, PyTorch {self.machine['torch']}, {self.date}"


def tables(result: Result) -> list[TextTable]:
    """Return the tables of a result: the methods beside each other, then every figure beside its target."""
    found = [_methods(result)] if result.row("step") or result.row("memory") else []
    if grid := result.row("grid"):
        found.append(_grid(grid))
    lines = [
        (row.name, figure.what, show(figure), figure.target, VERDICTS[figure.met])
        for row in result.rows
        for figure in row.figures
    ]
    lines += [(row.name, what, f"skipped: {why}", "", "") for row in result.rows for what, why in row.skipped.items()]
    return [*found, TextTable("Measured and target", ("row", "what", "measured", "target", "met"), tuple(lines), 2)]


def _methods(result: Result) -> TextTable:
    """Return a line for each method: its step's time and memory, and ratios to others."""
    step, memory = result.row("step"), result.row("memory")
    seconds = {} if step is None else {name: times["median"] for name, times in step.raw["seconds"].items()}
    held = {} if memory is None else memory.raw["bytes"]
    header: tuple[str, ...] = ("method",)
    if seconds:
        header += ("step, s", "÷ full", "÷ LoRA")
    if held:
        header += ("peak, MiB", "÷ LoRA", "saved, MiB", "at rest, MiB")
    lines = []
    for name, method in METHODS.items():
        cells = [method.label]
        if seconds:
            ratios = [seconds[name] / seconds[other] for other in ("full", "lora")]
            cells += [f"{seconds[name]:.3f}", *(f"{ratio:.2f}" for ratio in ratios)]
        if held:
            peak, saved, rest = (held[name][kind] / MIB for kind in ("peak", "saved", "rest"))
            cells += [
                _mebibytes(peak),
                f"{held[name]['peak'] / held['lora']['peak']:.2f}",
                _mebibytes(saved),
                _mebibytes(rest),
            ]
        lines.append(tuple(cells))
    return TextTable(f"One training step, batch {result.workload.batch_size}", header, tuple(lines))


def _grid(row: Row) -> TextTable:
    """Return a line for each case and method: its step's time and memory, and ratios to others."""
    lines = []
    for case in row.raw["cases"].values():
        for name, found in case["methods"].items():
            suffix = ", compiled" if name.endswith(", compiled") else ""
            full, lora = (case["methods"].get(f"{METHODS[key].label}{suffix}") for key in ("full", "lora"))
            lines.append(
                (
                    *(case["model"], case["precision"], str(case["batch_size"]), name, f"{1e3 * found['median']:.1f}"),
                    *(_ratio(found, other, "median") for other in (full, lora)),
                    _mebibytes(found["peak"] / MIB),
                    _ratio(found, lora, "peak"),
                    _mebibytes(found["alone"] / MIB),
                )
            )
    header: tuple[str, ...] = ("model", "precision", "batch", "method")
    header += ("step, ms", "÷ full", "÷ LoRA", "peak, MiB", "÷ LoRA", "in all, MiB")
    title = "Training steps of several models (in all: weights, what the method holds between steps, and the peak)"
    return TextTable(title, header, tuple(lines), 4)


def _ratio(found: Mapping[str, float], other: Mapping[str, float] | None, kind: str) -> str:
    """Return one method's number divided by another's, empty where that is missing or zero."""
    return f"{found[kind] / other[kind]:.2f}" if other and other[kind] else ""


def _mebibytes(value: float) -> str:
    """Return a number of MiB as text, with one digit after the point below 100."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def show(figure: Figure) -> str:
    """Return a figure's value with its unit."""
    return f"{figure.value:.3g} {figure.unit}" if figure.value >= 100 else f"{figure.value:.3f} {figure.unit}"


def markdown(result: Result) -> str:
    """Return the tables as Markdown, under a heading that says what was measured where."""
    parts = [result.heading]
    if result.workload.quick:
        parts.append(f"**{NO_EVIDENCE}**")
    for table in tables(result):
        parts.append(titled_markdown(table))
    if len(parts) > 2:
        parts.append(LEGEND)
    return "\n\n".join(parts) + "\n"
