"""The command `peft-fps benchmark overlap`."""

from typing import Annotated, Any, Literal

from rich.console import Console

from peft_fps.benchmarks.transfer.transfer_options import OverlapOptions
from peft_fps.cli.option_fields import options_of
from peft_fps.cli.terminal import Verbose, errors_told, say, show_text_table
from peft_fps.vision.option_types import count, described, pixels


HOW = "How weights are chosen"
"""Panel of `--help`."""

ImageSize = Annotated[int, pixels("Height and width of the images.", HOW, least=8)]
BatchSize = Annotated[int, count("Examples in a batch.", HOW)]
Attention = Annotated[
    Literal["sdpa", "eager"],
    described("Which of transformers' implementations a model's attention uses.", HOW),
]


@options_of(
    OverlapOptions,
    without=("tuned_share", "epochs", "precision", "threads"),
    image_size=ImageSize,
    batch_size=BatchSize,
    attention=Attention,
)
def overlap(verbose: Verbose = False, **options: Any) -> None:
    """Compare what methods select: with FPS, between seeds and between tasks. Nothing is trained.

    The seed decides which images are seen, in which order, and how they are augmented.

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
