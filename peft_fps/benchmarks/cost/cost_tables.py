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
        return (
            f"{load.model},{cut} {self.parameters:,} parameters, {load.precision}, {where}{malloc}, "
            f"PyTorch {self.machine['torch']}, {self.date}"
        )


def tables(result: Result) -> list[TextTable]:
    """Return the tables of a result: the methods beside each other, then every figure beside its target."""
    found = [_methods(result)] if result.row("step") or result.row("memory") else []
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
