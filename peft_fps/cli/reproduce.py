"""The commands `peft-fps reproduce vtab-1k` and `peft-fps reproduce fgvc`."""

import logging
from pathlib import Path

import typer
from rich.console import Console
from rich.logging import RichHandler

from peft_fps.cli import flags as common
from peft_fps.cli.errors import fail
from peft_fps.reproduce import flags
from peft_fps.reproduce.recipes import TASKS


app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")

ABOUT = {
    "vtab-1k": (
        "Train and evaluate a task of VTAB-1k, 1,000 images, as GPS and FPS do.",
        "--data is a folder with train800.txt, val200.txt, train800val200.txt and test.txt, each line an image path "
        "below the folder and a class index from 0, as the scripts of NOAH and SPT write VTAB-1k; or the folder above "
        "it, with one subfolder per task.",
    ),
    "fgvc": (
        "Train and evaluate a task of FGVC, birds, flowers, cars and dogs, as GPS and FPS do.",
        "--data is a folder with VPT's train.json, val.json and test.json, each from image path to class id, beside "
        "the images (paths begin at the folder, or at images/ or Images/ in it); or the folder above it, with one "
        "subfolder per task.",
    ),
}
"""By benchmark: what the command does, and the files that it reads."""


def page(benchmark: str, task: str, data: str) -> str:
    """Return the help of a command, with examples for one task and its data."""
    what, files = ABOUT[benchmark]
    command = f"    $ peft-fps reproduce {benchmark} --task {task} --data {data}"
    small = "--model WinKawaks/vit-tiny-patch16-224 --image-size 64 --epochs 2 --limit 100"
    paragraphs = (
        what,
        files,
        "Chooses the epoch on the validation images, reads the test images once, and lists what differs from the "
        "published recipe and from the papers. Everything is checked before anything is computed. Exit code 1 means "
        "that model, data or a combination of options cannot be used; 2, that a single option cannot.",
        f"[bold]Tasks:[/bold] {', '.join(TASKS[benchmark])}",
        "[bold]Examples[/bold]",
        "The published recipe, on a GPU:",
        f"{command} --precision fp16",
        "GPS instead of FPS, trained on training and validation images:",
        f"{command} --method gps --train-on-all",
        "Does everything work? A small model, few small images, two epochs:",
        f"{command} {small}",
    )
    return "\n\n".join(paragraphs)


@app.callback()
def commands() -> None:
    """Train a benchmark's task by the published recipe: backbone, splits, images, K, learning rate and the rest."""


@app.command("vtab-1k", help=page("vtab-1k", "cifar100", "vtab-1k"))
@app.command("fgvc", help=page("fgvc", "cub", "CUB_200_2011"))
def reproduce(
    context: typer.Context,
    task: flags.TaskFlag,
    data: flags.DataFlag,
    image_column: common.ImageColumnFlag = None,
    label_column: common.LabelColumnFlag = None,
    model: flags.ModelFlag = None,
    method: flags.MethodFlag = "fps",
    train_on_all: flags.TrainOnAllFlag = False,
    precision: flags.PrecisionFlag = flags.Precision.fp32,
    per_neuron: flags.PerNeuronFlag = None,
    epochs: flags.EpochsFlag = None,
    learning_rate: flags.LearningRateFlag = None,
    batch_size: flags.BatchSizeFlag = None,
    warm_up: flags.WarmUpFlag = None,
    drop_path: flags.DropPathFlag = None,
    ema: flags.EmaFlag = None,
    augmentation: flags.AugmentationFlag = None,
    image_size: flags.ImageSizeFlag = None,
    seed: flags.SeedFlag = None,
    limit: flags.LimitFlag = None,
    output: flags.OutputFlag = None,
    overwrite: common.OverwriteFlag = False,
    verbose: common.VerboseFlag = False,
) -> None:
    """Train and evaluate a task of the benchmark that the command is named after."""
    logging.basicConfig(format="%(message)s", handlers=[RichHandler(console=Console(stderr=True), show_path=False)])
    console = Console()
    from peft_fps.reproduce.reproduce_options import ReproduceOptions  # the imports take seconds, which --help need not wait for
    from peft_fps.reproduce.reproduction import reproduce as run
    from peft_fps.reproduce.summary import summary

    options = ReproduceOptions(
        benchmark=str(context.info_name),
        task=task,
        data=data,
        method=method,
        train_on_all=train_on_all,
        limit=limit,
        image_column=image_column,
        label_column=label_column,
        model=model,
        image_size=image_size,
        per_neuron=per_neuron,
        epochs=epochs,
        learning_rate=learning_rate,
        batch_size=batch_size,
        warm_up=warm_up,
        drop_path=drop_path,
        ema=ema,
        augmentation=None if augmentation is None else augmentation is flags.Switch.on,
        precision=precision.value,
        seed=seed,
        output=output or Path("runs/reproduce") / f"{task}-{method}",
        overwrite=overwrite,
    )
    try:
        results = run(options, console)
    except (ValueError, TypeError, OSError, ImportError) as error:
        fail(error, verbose)
    console.print(summary(results))
    console.print(f"saved in {options.output}", markup=False, highlight=False, soft_wrap=True)
