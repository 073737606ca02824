"""The command `peft-fps benchmark overlap`."""

from typing import Any

from rich.console import Console

from peft_fps.benchmarks.transfer.transfer_options import OverlapOptions
from peft_fps.cli.option_fields import options_of
from peft_fps.cli.terminal import Verbose, errors_told, say, show_text_table


@options_of(OverlapOptions, without=("tuned_share", "epochs", "precision", "threads"))
def overlap(verbose: Verbose = False, **options: Any) -> None:
    """Compare what methods select: with FPS, between seeds and between tasks. Nothing is trained.

    Seeds decide which images a selection from few of them sees, and their order.

    [bold]Example[/bold]

    How many images does a selection need?

        $ peft-fps benchmark overlap --model MODEL --tasks TASKS --methods 'fps-*-images'
    """
    from peft_fps.benchmarks.transfer.campaign import run_overlap  # takes seconds, which --help need not wait for

    with errors_told(verbose, RuntimeError):
        table, written = run_overlap(OverlapOptions(**options))
    console = Console()
    show_text_table(console, table)
    say(console, f"written: {', '.join(map(str, written))}")
