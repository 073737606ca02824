"""The commands."""

import logging
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

import peft_fps
from peft_fps.cli import benchmark, flags, reproduce
from peft_fps.cli.compare import compare
from peft_fps.cli.errors import fail
from peft_fps.cli.inspect import inspect
from peft_fps.cli.merge import merge
from peft_fps.vision.finetune_options import FinetuneOptions
from peft_fps.cli.select import select


app = typer.Typer(
    name="peft-fps",
    no_args_is_help=True,
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(benchmark.app, name="benchmark")
app.add_typer(reproduce.app, name="reproduce")
DEFAULTS = FinetuneOptions()
DEFAULT_PRECISION = flags.Precision(DEFAULTS.precision)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(peft_fps.__version__)
        raise typer.Exit


@app.callback()
def commands(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Selection-based fine-tuning: train the few existing weights that matter, chosen by a forward pass."""


@app.command()
def finetune(
    model: flags.ModelFlag = DEFAULTS.model,
    data: flags.DataFlag = DEFAULTS.data,
    image_column: flags.ImageColumnFlag = DEFAULTS.image_column,
    label_column: flags.LabelColumnFlag = DEFAULTS.label_column,
    image_size: flags.ImageSizeFlag = DEFAULTS.image_size,
    preset: flags.PresetFlag = DEFAULTS.preset,
    budget: flags.BudgetFlag = DEFAULTS.budget,
    per_neuron: flags.PerNeuronFlag = DEFAULTS.per_neuron,
    importance: flags.ImportanceFlag = None,
    order: flags.OrderFlag = None,
    loss: flags.LossFlag = None,
    granularity: flags.GranularityFlag = None,
    bias: flags.BiasFlag = None,
    calibration_batches: flags.CalibrationBatchesFlag = DEFAULTS.calibration_batches,
    epochs: flags.EpochsFlag = DEFAULTS.epochs,
    learning_rate: flags.LearningRateFlag = DEFAULTS.learning_rate,
    batch_size: flags.BatchSizeFlag = DEFAULTS.batch_size,
    precision: flags.PrecisionFlag = DEFAULT_PRECISION,
    seed: flags.SeedFlag = DEFAULTS.seed,
    output: flags.OutputFlag = DEFAULTS.output,
    overwrite: flags.OverwriteFlag = DEFAULTS.overwrite,
    verbose: flags.VerboseFlag = False,
) -> None:
    """Fine-tune an image classifier, and compare it with a linear head on the frozen model.

    Loads model and data, fits the linear head, chooses the weights to train (calibration) and shows the selection,
    trains, evaluates, saves the adapter, merges it, and verifies that the merged model and the reloaded adapter
    predict the same. Exit code 1 means that they do not, or that something was wrong with model, data or a
    combination of options; 2, that a single option was.

    [bold]Examples[/bold]

    The embedded model and data, in about a minute on two cores:

        $ peft-fps finetune

    A model from the Hub on a folder of photographs, train/CLASS/*.jpg and test/CLASS/*.jpg:

        $ peft-fps finetune --model google/vit-base-patch16-224-in21k --data photos --output runs/photos

    A quick look on a laptop: smaller images, fewer epochs:

        $ peft-fps finetune --model WinKawaks/vit-tiny-patch16-224 --data photos --image-size 112 --epochs 10

    One of timm's models by name, its weights from a local file:

        $ peft-fps finetune --model timm:vit_tiny_patch16_224@weights.safetensors --data photos

    Does the selection matter? The same number of weights, at random:

        $ peft-fps finetune --importance random --output runs/random

    Another published method, with its own training, and with fewer epochs of it:

        $ peft-fps finetune --preset bitfit --output runs/bitfit

        $ peft-fps finetune --preset gps --epochs 20 --output runs/gps
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
        epochs=epochs,
        learning_rate=learning_rate,
        batch_size=batch_size,
        precision=precision.value,
        seed=seed,
        output=output,
        overwrite=overwrite,
    )
    logging.basicConfig(format="%(message)s", handlers=[RichHandler(console=Console(stderr=True), show_path=False)])
    console = Console()
    from peft_fps.vision.finetuning import finetune as run  # the imports take seconds, which --help need not wait for
    from peft_fps.cli.summary import summary

    try:
        results = run(options, console)
    except (ValueError, TypeError, OSError, ImportError) as error:
        fail(error, verbose)
    console.print(summary(results))
    console.print(f"saved in {output}", markup=False, highlight=False, soft_wrap=True)
    if not all(checked["holds"] for checked in results["agreement"].values()):
        typer.echo("Error: what was saved does not predict what the trained model does; see the table.", err=True)
        raise typer.Exit(1)


app.command()(select)
app.command()(inspect)
app.command()(compare)
app.command()(merge)
