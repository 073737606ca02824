"""The command `peft-fps select`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from peft_fps.cli.option_fields import options_of
from peft_fps.cli.terminal import AsJson, Verbose, errors_told, print_json, say, show_log
from peft_fps.vision.default_training import BATCH
from peft_fps.vision.finetune_options import TRAINING_ONLY, FinetuneOptions
from peft_fps.vision.option_types import OUTPUT, SELECTION, count, described, seed_number


Output = Annotated[
    Path,
    described(
        "Gets selection.safetensors (for Selection.load, and for compare) and report.json (the table as data). "
        "Written whole or not at all.",
        OUTPUT,
        metavar="FOLDER",
    ),
]
BatchSize = Annotated[
    int | None, count(f"Images in a batch of calibration. Default: {BATCH}, unless --preset is given.", SELECTION)
]
Seed = Annotated[
    int,
    seed_number(
        "Seed of the order of the images, of drawn splits, of the output head and of --importance random.", SELECTION
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is in --output.", rich_help_panel=OUTPUT)]


@options_of(
    FinetuneOptions,
    without=(*TRAINING_ONLY, "output"),
    batch_size=BatchSize,
    seed=Seed,
    overwrite=Overwrite,
)
def select(output: Output, as_json: AsJson = False, verbose: Verbose = False, **options: Any) -> None:
    """Choose the weights to train, save the selection and show it; nothing is trained.

    The choice is that of `peft-fps finetune` with the same options. In a program, Selection.load(...).apply(model)
    gives the selection to an adapter. Exit code 1 means that model, data or a combination of options cannot be used.

    [bold]Examples[/bold]

    The embedded model and data:

        $ peft-fps select --output runs/selection

    A model from the Hub on 64 photographs of a folder:

        $ peft-fps select --model MODEL --data photos --calibration-batches 2 --output runs/fps

    Another method, and how far the two agree:

        $ peft-fps select --model MODEL --data photos --preset gps --output runs/gps

        $ peft-fps compare runs/fps/selection.safetensors runs/gps/selection.safetensors
    """
    show_log()
    # the imports take seconds, which --help need not wait for
    from peft_fps.vision.weight_choice import SELECTION, choose_weights

    with errors_told(verbose):
        report = choose_weights(FinetuneOptions(**options, output=output), Console(stderr=as_json))
    if as_json:
        print_json({"selection": str(output / SELECTION)} | report.to_dict())
        return
    say(Console(), str(report))
    say(Console(), f"saved in {output}")
