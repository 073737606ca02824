"""The commands `peft-fps benchmark transfer` and `peft-fps benchmark overlap`."""

import logging
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

from peft_fps.vision import option_types
from peft_fps.cli.errors import fail
from peft_fps.cli.tables import show


WHAT, HOW, MACHINE = "What is compared", "How it is trained", "Machine"

ModelFlag = Annotated[
    str,
    typer.Option(
        metavar="FOLDER|HUB_ID|timm:NAME",
        help="A pre-trained image classification model; timm:NAME as in peft-fps finetune.",
        rich_help_panel=WHAT,
    ),
]
TasksFlag = Annotated[
    Path,
    typer.Option(
        metavar="FOLDER",
        help="Holds a folder for each task, with labelled images in the splits train, validation and test, as "
        "`peft-fps finetune --data` takes them. A `meta.json` beside them may name the task's `group`.",
        rich_help_panel=WHAT,
    ),
]
OnlyFlag = Annotated[
    str | None,
    typer.Option(
        metavar="TASK,TASK...", help="Only these tasks, in the tables too; all if not given.", rich_help_panel=WHAT
    ),
]
MethodsFlag = Annotated[
    str,
    typer.Option(
        metavar="METHOD,METHOD...",
        help="By name, or in part with *, as in 'fps*'; `--list` shows all.",
        rich_help_panel=WHAT,
    ),
]
BudgetsFlag = Annotated[
    str,
    typer.Option(
        metavar="SHARE,SHARE...",
        help="Shares of the backbone's parameters to train, the output head apart.",
        rich_help_panel=WHAT,
    ),
]
SeedsFlag = Annotated[int, typer.Option(min=1, metavar="N", help="Seeds 0 to N - 1.", rich_help_panel=WHAT)]
BaselineFlag = Annotated[
    str, typer.Option(metavar="METHOD", help="What the others are compared with.", rich_help_panel=WHAT)
]
TunedShareFlag = Annotated[
    float,
    typer.Option(
        min=0.0,
        max=1.0,
        metavar="SHARE",
        help="At which each method's learning rate is chosen, for every task, with seed 0.",
        rich_help_panel=HOW,
    ),
]
ImageSizeFlag = Annotated[int, typer.Option(min=8, metavar="PIXELS", help="Height, width.", rich_help_panel=HOW)]
EpochsFlag = Annotated[int, typer.Option(min=1, metavar="N", help="Passes over the images.", rich_help_panel=HOW)]
BatchSizeFlag = Annotated[int, typer.Option(min=1, metavar="N", help="Images per step.", rich_help_panel=HOW)]
PrecisionFlag = Annotated[
    flags.Precision, typer.Option(help="Arithmetic of training; weights stay in float32.", rich_help_panel=HOW)
]
JobsFlag = Annotated[
    int, typer.Option(min=1, metavar="N", help="Cells at the same time, each a process.", rich_help_panel=MACHINE)
]
ThreadsFlag = Annotated[
    int, typer.Option(min=1, metavar="N", help="CPU threads of each of them.", rich_help_panel=MACHINE)
]
ListFlag = Annotated[bool, typer.Option("--list", help="Show the methods and stop.")]
ReportFlag = Annotated[bool, typer.Option("--report", help="Run nothing; write the tables of what is there.")]
OutputFlag = Annotated[
    Path,
    typer.Option(
        file_okay=False,
        metavar="FOLDER",
        help="Gets cells.jsonl, a line for each finished cell; transfer.md, the tables; transfer.png. A run that was "
        "stopped goes on here, and other methods, tasks or seeds are added to what is there.",
        rich_help_panel=flags.OUTPUT,
    ),
]
BudgetFlag = Annotated[
    float,
    typer.Option(min=0.0, max=1.0, metavar="SHARE", help="Of the backbone's parameters.", rich_help_panel=WHAT),
]
ReferenceFlag = Annotated[
    str, typer.Option(metavar="METHOD", help="What the others are compared with.", rich_help_panel=WHAT)
]
OverlapOutputFlag = Annotated[
    Path,
    typer.Option(
        file_okay=False,
        metavar="FOLDER",
        help="Gets overlap.json and overlap.md; those of an earlier run are replaced.",
        rich_help_panel=flags.OUTPUT,
    ),
]


def transfer(
    model: ModelFlag = "WinKawaks/vit-tiny-patch16-224",
    tasks: TasksFlag = Path("tasks"),
    only: OnlyFlag = None,
    methods: MethodsFlag = "linear,bitfit,full,lora,random,magnitude,fps,gps",
    budgets: BudgetsFlag = "0.0077",
    seeds: SeedsFlag = 3,
    baseline: BaselineFlag = "gps",
    tuned_share: TunedShareFlag = 0.0077,
    image_size: ImageSizeFlag = 112,
    epochs: EpochsFlag = 5,
    batch_size: BatchSizeFlag = 16,
    precision: PrecisionFlag = flags.Precision.bf16,
    jobs: JobsFlag = 2,
    threads: ThreadsFlag = 1,
    list_methods: ListFlag = False,
    report: ReportFlag = False,
    output: OutputFlag = Path("runs/transfer"),
    verbose: flags.VerboseFlag = False,
) -> None:
    """Compare methods by their accuracy on many small image tasks, at equal numbers of trained parameters.

    A cell is a method on a task with a seed. All methods get the same data, schedule and head; each one's learning
    rate is, for every task, the best of three on its validation images. Test images are read once per cell, when
    training has ended. The same cell gives the same accuracy again, on the same machine with the same number of
    threads.

    [bold]Examples[/bold]

    FPS beside random selection and a linear head, one seed:

        $ peft-fps benchmark transfer --model MODEL --tasks TASKS --methods linear,random,fps --seeds 1

    The tables of what has been run so far:

        $ peft-fps benchmark transfer --model MODEL --tasks TASKS --report
    """
    logging.basicConfig(format="%(message)s", handlers=[RichHandler(console=Console(stderr=True), show_path=False)])
    # the imports take seconds, which --help need not wait for
    from peft_fps.benchmarks.transfer.arms import ARMS
    from peft_fps.benchmarks.transfer.cells import Setting
    from peft_fps.benchmarks.transfer.campaign import TransferOptions, run

    console = Console()
    if list_methods:
        for name, arm in ARMS.items():
            console.print(f"{name:32}{arm.label}", markup=False, highlight=False)
        return
    setting = Setting(model, str(tasks), image_size, epochs, batch_size, precision.value, threads, tuned_share)
    options = TransferOptions(
        setting, names(methods), names(budgets), None if only is None else names(only), seeds, baseline, jobs, output
    )
    try:
        found, written = run(options, fill=not report)
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        fail(error, verbose)
    for table in found:
        show(console, table)
    console.print(f"written: {', '.join(map(str, written))}", markup=False, highlight=False, soft_wrap=True)


def overlap(
    model: ModelFlag = "WinKawaks/vit-tiny-patch16-224",
    tasks: TasksFlag = Path("tasks"),
    only: OnlyFlag = None,
    methods: MethodsFlag = "fps-*-images,fps-augmented,fps-l2,fps-unweighted,magnitude,random,gps",
    budget: BudgetFlag = 0.0077,
    seeds: SeedsFlag = 3,
    reference: ReferenceFlag = "fps",
    image_size: ImageSizeFlag = 112,
    batch_size: BatchSizeFlag = 16,
    output: OverlapOutputFlag = Path("runs/overlap"),
    verbose: flags.VerboseFlag = False,
) -> None:
    """Compare what methods select: with FPS, between seeds and between tasks. Nothing is trained.

    Seeds decide which images a selection from few of them sees, and their order.

    [bold]Example[/bold]

    How many images does a selection need?

        $ peft-fps benchmark overlap --model MODEL --tasks TASKS --methods 'fps-*-images'
    """
    from peft_fps.benchmarks.transfer.cells import Setting
    from peft_fps.benchmarks.transfer.campaign import run_overlap

    setting = Setting(model, str(tasks), image_size, batch_size=batch_size)
    try:
        table, written = run_overlap(
            setting, None if only is None else names(only), names(methods), reference, budget, seeds, output
        )
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        fail(error, verbose)
    console = Console()
    show(console, table)
    console.print(f"written: {', '.join(map(str, written))}", markup=False, highlight=False, soft_wrap=True)


def names(value: str) -> tuple[str, ...]:
    """Split a list at commas."""
    return tuple(name.strip() for name in value.split(",") if name.strip())
