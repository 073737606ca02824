"""The command `peft-fps benchmark transfer`."""

from typing import Annotated, Any

import typer
from rich.console import Console

from peft_fps.benchmarks.transfer.arms import ARMS
from peft_fps.benchmarks.transfer.transfer_options import TransferOptions
from peft_fps.cli.option_fields import options_of
from peft_fps.cli.terminal import Verbose, errors_told, say, show_log, show_text_table


ListMethods = Annotated[bool, typer.Option("--list", help="Show the methods and stop.")]
Report = Annotated[bool, typer.Option("--report", help="Run nothing; write the tables of what is there.")]


@options_of(TransferOptions)
def transfer(
    list_methods: ListMethods = False, report: Report = False, verbose: Verbose = False, **options: Any
) -> None:
    """Compare methods by their accuracy on many small image tasks, at equal numbers of trained parameters.

    A cell is a method on a task with a seed. All methods get the same data, schedule and head. For every task, each
    method has the best of three learning rates on the validation images. Test images are read once per cell, when
    training has ended. On the same machine with the same number of threads, the same cell gives the same accuracy.

    [bold]Examples[/bold]

    FPS beside random selection and a linear head, one seed:

        $ peft-fps benchmark transfer --model MODEL --tasks TASKS --methods linear,random,fps --seeds 1

    The tables of what has been run so far:

        $ peft-fps benchmark transfer --model MODEL --tasks TASKS --report
    """
    show_log()
    from peft_fps.benchmarks.transfer.campaign import run  # takes seconds, which --help need not wait for

    console = Console()
    if list_methods:
        for name, arm in ARMS.items():
            if not arm.retired:
                console.print(f"{name:34}{arm.label}", markup=False, highlight=False)
        return
    with errors_told(verbose, RuntimeError):
        found, written = run(TransferOptions(**options), fill=not report)
    for table in found:
        show_text_table(console, table)
    say(console, f"written: {', '.join(map(str, written))}")
