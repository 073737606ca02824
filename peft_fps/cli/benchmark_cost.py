"""The commands `peft-fps benchmark ...`; this module holds `cost`."""

import logging
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

from peft_fps.vision import option_types
from peft_fps.cli.errors import fail
from peft_fps.cli.tables import show
from peft_fps.cli.benchmark_transfer import overlap, transfer


MEASURED, MACHINE = "What is measured", "Machine"
ROWS = ("step", "memory", "selection", "importance", "merge", "switch", "inference", "file", "attach")
DEFAULT_ROWS = ",".join(row for row in ROWS if row != "importance")
FOLDER = Path("runs/cost")

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")


class Device(str, Enum):
    """Where the model computes."""

    cpu = "cpu"
    cuda = "cuda"


def known_rows(value: str) -> str:
    """Refuse a list of rows that names none or an unknown one."""
    names = [name.strip() for name in value.split(",") if name.strip()]
    unknown = [name for name in names if name not in ROWS]
    if unknown or not names:
        raise typer.BadParameter(f"{value!r} is no list of rows; there are {', '.join(ROWS)}.")
    return ",".join(dict.fromkeys(names))


ModelFlag = Annotated[
    str,
    typer.Option(
        metavar="NAME|FOLDER|HUB_ID",
        help="vit-b16 (86 million parameters), vit-l16 (303 million) or decoder-0.5b (a Llama of 0.54 billion, 128 "
        "tokens), all with random weights; or an image classification model in a folder or on the Hub, as it is.",
        rich_help_panel=MEASURED,
    ),
]
RowsFlag = Annotated[
    str,
    typer.Option(
        callback=known_rows,
        metavar="ROW,ROW...",
        help="step: seconds of a training step of ten methods. memory: bytes of the same. selection: choosing the "
        "weights, beside bare forward passes and gradients. merge: merging and unmerging. switch: another loaded "
        "adapter. inference: with an adapter that is not merged. file: bytes on disk. attach: adding and loading. "
        "Only if named: importance: choosing the weights by every importance.",
        rich_help_panel=MEASURED,
    ),
]
BatchSizeFlag = Annotated[
    int,
    typer.Option(min=1, metavar="N", help="Examples in a training step and in switch.", rich_help_panel=MEASURED),
]
SelectionBatchSizeFlag = Annotated[
    int,
    typer.Option(
        min=2,
        metavar="N",
        help="Examples in a batch that weights are chosen on. Selection by gradients on two views of 32 images needs "
        "some 15 GB with vit-b16; a smaller number needs less.",
        rich_help_panel=MEASURED,
    ),
]
PrecisionFlag = Annotated[
    flags.Precision,
    typer.Option(
        help="Arithmetic: float32, or bfloat16 where that is safe (autocast). Weights stay in float32.",
        rich_help_panel=MEASURED,
    ),
]
RoundsFlag = Annotated[
    int,
    typer.Option(
        min=1,
        metavar="N",
        help="Times that every task is measured, in turn with the others; the medians count. What takes milliseconds "
        "is measured six times as often.",
        rich_help_panel=MEASURED,
    ),
]
QuickFlag = Annotated[
    bool,
    typer.Option(
        "--quick",
        help="Two layers and few rounds, all in two minutes: to see that everything works. No evidence of anything.",
        rich_help_panel=MEASURED,
    ),
]
ThreadsFlag = Annotated[
    int, typer.Option(min=1, metavar="N", help="CPU threads of the arithmetic.", rich_help_panel=MACHINE)
]
SystemMallocFlag = Annotated[
    bool,
    typer.Option(
        "--system-malloc",
        help="Leave the C library's way with freed memory as it is. Without this flag it keeps it for the next step, "
        "since otherwise a step's time depends on where on the heap its memory happens to lie.",
        rich_help_panel=MACHINE,
    ),
]
DeviceFlag = Annotated[Device, typer.Option(help="Where the model computes.", rich_help_panel=MACHINE)]
OutputFlag = Annotated[
    Path,
    typer.Option(
        file_okay=False,
        metavar="FOLDER",
        help="Gets cost.json (everything, with all times and versions), cost.md (the tables) and cost.png (memory "
        "against time, if step and memory are measured); those of an earlier run are replaced.",
        rich_help_panel=flags.OUTPUT,
    ),
]


app.command()(transfer)
app.command()(overlap)


@app.callback()
def commands() -> None:
    """Measure on this machine what the method costs and how well it does."""


@app.command()
def cost(
    model: ModelFlag = "vit-b16",
    rows: RowsFlag = DEFAULT_ROWS,
    batch_size: BatchSizeFlag = 8,
    selection_batch_size: SelectionBatchSizeFlag = 32,
    precision: PrecisionFlag = flags.Precision.fp32,
    rounds: RoundsFlag = 7,
    quick: QuickFlag = False,
    threads: ThreadsFlag = 2,
    device: DeviceFlag = Device.cpu,
    system_malloc: SystemMallocFlag = False,
    output: OutputFlag = FOLDER,
    verbose: flags.VerboseFlag = False,
) -> None:
    """Measure time, memory and bytes of FPS beside LoRA, SHiRA, Super-Tuning, gradient masks and full fine-tuning.

    All methods take turns in one process, so that a machine that slows down slows all of them; ratios are ratios of
    medians. Memory is counted in a process for each method. Every figure stands beside its target, met or not. The
    exit code is 0 either way; 1 means that something could not be measured.

    [bold]Examples[/bold]

    Does everything work? Two minutes on two cores:

        $ peft-fps benchmark cost --quick

    Everything on a ViT-B/16, about half an hour on two cores with 24 GB of memory:

        $ peft-fps benchmark cost --output runs/vit-b16

    Only the training step, memory and time, of a language model:

        $ peft-fps benchmark cost --model decoder-0.5b --rows step,memory

    On a GPU, in mixed precision:

        $ peft-fps benchmark cost --device cuda --precision bf16 --batch-size 64
    """
    logging.basicConfig(format="%(message)s", handlers=[RichHandler(console=Console(stderr=True), show_path=False)])
    logging.getLogger("peft_fps.benchmarks").setLevel(logging.INFO)
    from peft_fps.benchmarks.cost.suite import measure, write  # the imports take seconds, which --help need not wait for
    from peft_fps.benchmarks.cost.cost_tables import NO_EVIDENCE, tables
    from peft_fps.benchmarks.cost.workload import Workload

    workload = Workload(
        model,
        batch_size,
        selection_batch_size,
        threads,
        device.value,
        precision.value,
        rounds,
        quick,
        system_malloc,
    )
    try:
        result = measure(workload, rows.split(","))
        written = write(result, output)
    except (ValueError, OSError, RuntimeError) as error:
        fail(error, verbose)
    console = Console()
    for table in tables(result):
        show(console, table)
    console.print(result.heading, markup=False, highlight=False, soft_wrap=True)
    if quick:
        console.print(NO_EVIDENCE, style="bold")
    console.print(f"written: {', '.join(map(str, written))}", markup=False, highlight=False, soft_wrap=True)
