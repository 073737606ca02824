"""The options of the commands as the command line knows them: type, unit and help."""

import math
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from peft_fps.config import DEFAULT_BUDGET


DATA, SELECTION, TRAINING, OUTPUT = "Model and data", "What is trained", "Training", "Output"


class Importance(str, Enum):
    """How a weight is scored."""

    activation = "activation"
    magnitude = "magnitude"
    random = "random"


class Granularity(str, Enum):
    """Among which weights the best are chosen."""

    neuron = "neuron"
    layer = "layer"
    model = "model"


class Bias(str, Enum):
    """Which biases are trained."""

    all = "all"
    none = "none"


class Precision(str, Enum):
    """Number format of the arithmetic in training."""

    fp32 = "fp32"
    bf16 = "bf16"


def positive(value: float) -> float:
    """Refuse a number that is not positive and finite."""
    if not 0 < value < math.inf:
        raise typer.BadParameter(f"{value} is not a positive number.")
    return value


ModelFlag = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER|HUB_ID",
        help="Pre-trained image model. It is loaded in float32 and gets a new output head for the classes of the "
        "data. Without it: an embedded tiny ViT (0.9 million parameters, 32 px).",
        rich_help_panel=DATA,
    ),
]
DataFlag = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER|FILE|HUB_ID",
        help="Labelled images: a folder with one subfolder per class (below train/, validation/, test/ where there "
        "are splits), a folder with parquet files (train*.parquet, validation*.parquet, test*.parquet), a folder "
        "written by save_to_disk of datasets, or a data set on the Hub, HUB_ID:CONFIG if it has several "
        "configurations. Splits that are missing are drawn from those that are there. Without it: scikit-learn's "
        "1,797 handwritten digits.",
        rich_help_panel=DATA,
    ),
]
ImageColumnFlag = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Column with the images. Without it: found by its type.", rich_help_panel=DATA),
]
LabelColumnFlag = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Column with the classes (class labels or integers). Without it: found by its name or type.",
        rich_help_panel=DATA,
    ),
]
ImageSizeFlag = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="PIXELS",
        help="Height and width of the images that the model sees; a ViT interpolates its position embeddings to it. "
        "112 instead of 224 makes a ViT about four times as fast. The merged model then wants "
        "interpolate_pos_encoding=True when it is called. Without it: the model's own size.",
        rich_help_panel=DATA,
    ),
]
BudgetFlag = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        help="Largest share of the model's parameters to train, 0 to 1: selected weights and biases together, output "
        f"head left out. Without it and --per-neuron: {DEFAULT_BUDGET}, that is {DEFAULT_BUDGET:.2%}. 0 trains biases "
        "alone.",
        rich_help_panel=SELECTION,
    ),
]
PerNeuronFlag = Annotated[
    float | None,
    typer.Option(
        metavar="K",
        help="Selected weights per output neuron, instead of --budget. Need not be whole.",
        rich_help_panel=SELECTION,
    ),
]
ImportanceFlag = Annotated[
    Importance,
    typer.Option(
        help="How a weight is scored: by its magnitude times the typical magnitude of its input (FPS), by its "
        "magnitude alone, or at random (a control).",
        rich_help_panel=SELECTION,
    ),
]
GranularityFlag = Annotated[
    Granularity,
    typer.Option(
        help="Where the best weights are chosen: equally many per output neuron, the best of each layer, or the best "
        "of the whole model.",
        rich_help_panel=SELECTION,
    ),
]
BiasFlag = Annotated[
    Bias, typer.Option(help="Train the biases of the adapted layers, or leave them.", rich_help_panel=SELECTION)
]
CalibrationBatchesFlag = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Batches of training images to measure inputs on. Without it: all of them, once.",
        rich_help_panel=SELECTION,
    ),
]
EpochsFlag = Annotated[
    int, typer.Option(min=1, metavar="N", help="Passes over the training images.", rich_help_panel=TRAINING)
]
LearningRateFlag = Annotated[
    float,
    typer.Option(
        callback=positive,
        metavar="RATE",
        help="Peak learning rate of Adam (no weight decay), for the selected weights and the output head alike. It "
        "rises over the first tenth of the steps and falls to 0 along a cosine.",
        rich_help_panel=TRAINING,
    ),
]
BatchSizeFlag = Annotated[
    int, typer.Option(min=1, metavar="N", help="Images per step and device.", rich_help_panel=TRAINING)
]
PrecisionFlag = Annotated[
    Precision,
    typer.Option(
        help="Arithmetic in training: float32, or bfloat16 where that is safe (autocast). Weights, calibration and "
        "evaluation stay in float32.",
        rich_help_panel=TRAINING,
    ),
]
SeedFlag = Annotated[
    int,
    typer.Option(
        min=0,
        max=2**32 - 1,
        metavar="N",
        help="Seed of the output head, of the order of the images, of drawn splits and of --importance random.",
        rich_help_panel=TRAINING,
    ),
]
OutputFlag = Annotated[
    Path,
    typer.Option(
        metavar="FOLDER",
        help="Gets adapter/ (the PEFT adapter), merged/ (the model with the adapter merged, and its image processor) "
        "and results.json (everything in the final table, and how it came about).",
        rich_help_panel=OUTPUT,
    ),
]
OverwriteFlag = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace the results of an earlier run in --output.", rich_help_panel=OUTPUT),
]
VerboseFlag = Annotated[
    bool, typer.Option("--verbose", help="Show where in the code an error arose.", rich_help_panel=OUTPUT)
]
