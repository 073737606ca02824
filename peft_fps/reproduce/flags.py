"""The options of `peft-fps reproduce` as the command line knows them: type, unit and help."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from peft_fps.vision import option_types
from peft_fps.reproduce.recipes import BENCHMARKS, COMMON, TASKS


RECIPE = "Recipe, where it is not to be the published one"


class Precision(str, Enum):
    """Number format of the arithmetic in training."""

    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


class Switch(str, Enum):
    """Whether something is done."""

    on = "on"
    off = "off"


def known_task(context: typer.Context, value: str) -> str:
    """Refuse a name that is no task of the benchmark that the command is named after."""
    tasks = TASKS[str(context.info_name)]
    if value not in tasks:
        raise typer.BadParameter(f"{value!r} is no task of {BENCHMARKS[str(context.info_name)]}: {', '.join(tasks)}.")
    return value


def share(value: float | None) -> float | None:
    """Refuse a number outside 0 to 1, 1 itself left out."""
    if value is not None and not 0 <= value < 1:
        raise typer.BadParameter(f"{value} is not at least 0 and below 1.")
    return value


TaskFlag = Annotated[
    str,
    typer.Option(callback=known_task, metavar="NAME", help="The task, see above.", rich_help_panel=flags.DATA),
]
DataFlag = Annotated[
    str,
    typer.Option(
        metavar="FOLDER|HUB_ID",
        help="A folder with the benchmark's own files (see above), or with one subfolder of the task's name that has "
        "them. Or, as for finetune: a folder with one subfolder per class or with parquet files, or a data set on the "
        "Hub, HUB_ID:CONFIG if it has several configurations.",
        rich_help_panel=flags.DATA,
    ),
]
ModelFlag = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER|HUB_ID",
        help=f"Pre-trained image model. Without it the papers': {COMMON['model']}, which needs timm: "
        'pip install "peft-fps\\[reproduce]". Images are normalised as the model wants it; for this one with 0.5 and '
        "0.5.",
        rich_help_panel=flags.DATA,
    ),
]
MethodFlag = Annotated[
    str,
    typer.Option(
        callback=flags.known_preset,
        metavar="NAME",
        help=f"How the weights are chosen: {', '.join(flags.PRESETS)}. Methods other than fps and gps are trained by "
        "the same recipe.",
        rich_help_panel=flags.SELECTION,
    ),
]
TrainOnAllFlag = Annotated[
    bool,
    typer.Option(
        "--train-on-all",
        help="Train on the validation images too, as the papers do, and keep the last epoch. Without it the epoch "
        "that is best on the validation images is kept.",
        rich_help_panel=flags.TRAINING,
    ),
]
LimitFlag = Annotated[
    int | None,
    typer.Option(
        min=2, metavar="N", help="Only the first N images of each split, for a trial.", rich_help_panel=RECIPE
    ),
]
ImageSizeFlag = Annotated[
    int | None,
    typer.Option(min=1, metavar="PIXELS", help="Height and width; 224 in the recipe.", rich_help_panel=RECIPE),
]
PerNeuronFlag = Annotated[
    float | None,
    typer.Option(min=0, metavar="K", help="Selected weights per output neuron.", rich_help_panel=RECIPE),
]
EpochsFlag = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Passes over the training images; 100 in the recipe.", rich_help_panel=RECIPE
    ),
]
LearningRateFlag = Annotated[
    float | None,
    typer.Option(callback=flags.positive, metavar="RATE", help="Peak learning rate of Adam.", rich_help_panel=RECIPE),
]
BatchSizeFlag = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Images per step.", rich_help_panel=RECIPE)
]
WarmUpFlag = Annotated[
    float | None,
    typer.Option(
        callback=share,
        metavar="SHARE",
        help="Share of the steps over which the learning rate rises; 0.1 in the recipe.",
        rich_help_panel=RECIPE,
    ),
]
DropPathFlag = Annotated[
    float | None,
    typer.Option(callback=share, metavar="RATE", help="Drop-path in the last block.", rich_help_panel=RECIPE),
]
EmaFlag = Annotated[
    float | None,
    typer.Option(
        callback=share,
        metavar="DECAY",
        help="Decay of the running average of the weights, 0 for none.",
        rich_help_panel=RECIPE,
    ),
]
AugmentationFlag = Annotated[
    Switch | None,
    typer.Option(
        help="Random crops and mirroring, mixup, CutMix and label smoothing; on for fgvc, off for vtab-1k in the "
        "recipe.",
        rich_help_panel=RECIPE,
    ),
]
SeedFlag = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=2**32 - 1,
        metavar="N",
        help="Seed of everything that is drawn; 42 in the recipe.",
        rich_help_panel=RECIPE,
    ),
]
PrecisionFlag = Annotated[
    Precision,
    typer.Option(
        help="Arithmetic in training, where that is safe (autocast). The papers': fp16, which needs a GPU.",
        rich_help_panel=RECIPE,
    ),
]
OutputFlag = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Gets adapter/ (the PEFT adapter) and results.json (everything in the final table, all epochs, and how "
        "it came about). Without it: runs/reproduce/TASK-METHOD.",
        rich_help_panel=flags.OUTPUT,
    ),
]
