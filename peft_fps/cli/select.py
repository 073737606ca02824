"""The command `peft-fps select`."""

import logging
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

from peft_fps.vision import option_types
from peft_fps.cli.terminal import print_json
from peft_fps.cli.errors import fail
from peft_fps.vision.output_folders import check_output
from peft_fps.cli.inspect import JsonFlag
from peft_fps.vision.finetune_options import FinetuneOptions, check_path
from peft_fps.vision.timm_names import local_path


OutputFlag = Annotated[
    Path,
    typer.Option(
        metavar="FOLDER",
        help="Gets selection.safetensors (for Selection.load, and for compare) and report.json (the table as data). "
        "Written whole or not at all.",
        rich_help_panel=flags.OUTPUT,
    ),
]
OverwriteFlag = Annotated[
    bool, typer.Option("--overwrite", help="Replace what is in --output.", rich_help_panel=flags.OUTPUT)
]
BatchSizeFlag = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help=f"Images in a batch of calibration. Without it and --preset: {flags.BATCH}.",
        rich_help_panel=flags.SELECTION,
    ),
]
SeedFlag = Annotated[
    int,
    typer.Option(
        min=0,
        max=2**32 - 1,
        metavar="N",
        help="Seed of the order of the images, of drawn splits, of the output head and of --importance random.",
        rich_help_panel=flags.SELECTION,
    ),
]


def select(
    output: OutputFlag,
    model: flags.ModelFlag = None,
    data: flags.DataFlag = None,
    image_column: flags.ImageColumnFlag = None,
    label_column: flags.LabelColumnFlag = None,
    image_size: flags.ImageSizeFlag = None,
    preset: flags.PresetFlag = None,
    budget: flags.BudgetFlag = None,
    per_neuron: flags.PerNeuronFlag = None,
    importance: flags.ImportanceFlag = None,
    order: flags.OrderFlag = None,
    loss: flags.LossFlag = None,
    granularity: flags.GranularityFlag = None,
    bias: flags.BiasFlag = None,
    calibration_batches: flags.CalibrationBatchesFlag = None,
    batch_size: BatchSizeFlag = None,
    seed: SeedFlag = 0,
    overwrite: OverwriteFlag = False,
    as_json: JsonFlag = False,
    verbose: flags.VerboseFlag = False,
) -> None:
    """Choose the weights to train, save the selection and show it; nothing is trained.

    Chooses as `peft-fps finetune` with the same options does. In a program, Selection.load(...).apply(model) gives
    the selection to an adapter. Exit code 1 means that model, data or a combination of options cannot be used.

    [bold]Examples[/bold]

    The embedded model and data:

        $ peft-fps select --output runs/selection

    A model from the Hub on 64 photographs of a folder:

        $ peft-fps select --model MODEL --data photos --calibration-batches 2 --output runs/fps

    Another method, and how far the two agree:

        $ peft-fps select --model MODEL --data photos --preset gps --output runs/gps

        $ peft-fps compare runs/fps/selection.safetensors runs/gps/selection.safetensors
    """
    options = FinetuneOptions(
        model=model,
        data=data,
        image_column=image_column,
        label_column=label_column,
        image_size=image_size,
        preset=preset,
        budget=budget,
        per_neuron=per_neuron,
        importance=importance,
        order=order and order.value,
        loss=loss and loss.value,
        granularity=granularity and granularity.value,
        bias=bias and bias.value,
        calibration_batches=calibration_batches,
        batch_size=batch_size,
        seed=seed,
        output=output,
        overwrite=overwrite,
    )
    logging.basicConfig(format="%(message)s", handlers=[RichHandler(console=Console(stderr=True), show_path=False)])
    from peft_fps.vision.weight_choice import SELECTION
    from peft_fps.vision.weight_choice import select as run  # the imports take seconds, which --help need not wait for

    try:
        for option, source in (("--model", model), ("--data", data)):
            if source is not None:
                check_path(option, source)
        check_output(output, overwrite, tuple(local_path(source) for source in (model, data) if source))
        report = run(options, Console(stderr=True) if as_json else Console())
    except (ValueError, TypeError, OSError, ImportError) as error:
        fail(error, verbose)
    if as_json:
        print_json({"selection": str(output / SELECTION)} | report.to_dict())
        return
    console = Console()
    console.print(str(report), markup=False, highlight=False, soft_wrap=True)
    console.print(f"saved in {output}", markup=False, highlight=False, soft_wrap=True)
