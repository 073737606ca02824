"""The command `peft-fps benchmark derive`."""

from typing import Any

from rich.console import Console

from peft_fps.benchmarks.transfer.transfer_options import DeriveOptions
from peft_fps.cli.option_fields import options_of
from peft_fps.cli.terminal import Verbose, errors_told, say


@options_of(DeriveOptions)
def derive(verbose: Verbose = False, **options: Any) -> None:
    """Make tasks of other kinds out of the images of given tasks: orientation, position, number, colour, distance.

    Each has 800 images for training, 200 for validation and 1,000 for test, with equally many of every class. Images
    of a split are made of images of that split alone. The same seed gives the same files.

    [bold]Example[/bold]

    Run methods on them:

        $ peft-fps benchmark derive --tasks TASKS --output runs/tasks
        $ peft-fps benchmark transfer --model MODEL --tasks runs/tasks --methods linear,fps-biases
    """
    from peft_fps.benchmarks.transfer import derived_tasks  # takes seconds, which --help need not wait for

    chosen = DeriveOptions(**options)
    with errors_told(verbose):
        written = derived_tasks.derive(chosen.tasks, chosen.output, chosen.seed)
    say(Console(), f"written: {', '.join(map(str, written))}")
