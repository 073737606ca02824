"""The command `peft-fps benchmark cost`."""

import logging
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from peft_fps.benchmarks.cost.workload import MEASURED, Workload
from peft_fps.cli.option_fields import options_of
from peft_fps.cli.terminal import Verbose, errors_told, say, show_log, show_text_table
from peft_fps.vision.option_types import OUTPUT, described


USUAL = ("step", "memory", "selection", "merge", "switch", "inference", "file", "attach")
ROWS = (*USUAL[:3], "importance", *USUAL[3:], "recipe", "tokens", "grid")
DEFAULT_ROWS = ",".join(USUAL)
ON_CUDA = "grid"
FOLDER = Path("runs/cost")


def known_rows(value: str | None) -> str | None:
    """Return a list of rows at commas, each once; None if none is given.

    Raises:
        typer.BadParameter: it names none or an unknown one.
    """
    if value is None:
        return None
    names = [name.strip() for name in value.split(",") if name.strip()]
    unknown = [name for name in names if name not in ROWS]
    if unknown or not names:
        raise typer.BadParameter(f"{value!r} is no list of rows; there are {', '.join(ROWS)}.")
    return ",".join(dict.fromkeys(names))


Rows = Annotated[
    str | None,
    described(
        "step: seconds of a training step of ten methods. memory: bytes of the same. selection: choosing the "
        "weights, beside bare forward passes and gradients. merge: merging and unmerging. switch: another loaded "
        "adapter. inference: with an adapter that is not merged. file: bytes on disk. attach: adding and loading. "
        "Four rows are measured only if named. importance: choosing the weights by every importance. recipe: what "
        "centred inputs and rates by kind, the default, add to training. tokens: steps, memory and inference of a "
        "vision transformer with token selection, beside LoRA and the frozen network. grid: steps of vit-b16, vit-l16 "
        "and decoder-1b in both precisions, with and without torch.compile, in eight minutes; by default --device "
        "cuda measures grid alone.",
        MEASURED,
        metavar="ROW,ROW...",
        callback=known_rows,
    ),
]
Output = Annotated[
    Path,
    described(
        "Gets cost.json (everything, with all times and versions), cost.md (the tables) and cost.png (memory "
        "against time, if step and memory are measured); those of an earlier run are replaced.",
        OUTPUT,
        metavar="FOLDER",
        file_okay=False,
    ),
]


@options_of(Workload)
def cost(rows: Rows = None, output: Output = FOLDER, verbose: Verbose = False, **options: Any) -> None:
    """Measure time, memory and bytes of FPS beside LoRA, SHiRA, Super-Tuning, gradient masks and full fine-tuning.

    All methods take turns in one process, so that a machine that slows down slows all of them. Ratios are ratios of
    medians. Memory is counted in a process of its own for each method, except in the row grid. Every figure stands
    beside its target, met or not. The exit code is 0 either way; 1 means that something could not be measured.

    [bold]Examples[/bold]

    Does everything work? Two minutes on two cores:

        $ peft-fps benchmark cost --quick

    Everything on a ViT-B/16, about half an hour on two cores with 24 GB of memory:

        $ peft-fps benchmark cost --output runs/vit-b16

    Only the training step, memory and time, of a language model:

        $ peft-fps benchmark cost --model decoder-0.5b --rows step,memory

    Training steps on a GPU, in eight minutes:

        $ peft-fps benchmark cost --device cuda
    """
    show_log()
    logging.getLogger("peft_fps.benchmarks").setLevel(logging.INFO)
    from peft_fps.benchmarks.cost.cost_tables import NO_EVIDENCE, tables
    from peft_fps.benchmarks.cost.suite import measure, write  # takes seconds, which --help need not wait for

    workload = Workload(**options)
    with errors_told(verbose, RuntimeError):
        result = measure(workload, (rows or (ON_CUDA if workload.device == "cuda" else DEFAULT_ROWS)).split(","))
        written = write(result, output)
    console = Console()
    for table in tables(result):
        show_text_table(console, table)
    say(console, result.heading)
    if workload.quick:
        console.print(NO_EVIDENCE, style="bold")
    say(console, f"written: {', '.join(map(str, written))}")
