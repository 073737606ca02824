"""The options of the commands as the command line knows them: type, unit and help."""

import math
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from peft_fps.vision.finetune_options import RECIPE, SELECTION_DEFAULTS
from peft_fps.config import DEFAULT_BUDGET
from peft_fps.importances import IMPORTANCES
from peft_fps.presets import PRESETS


RATE, EPOCHS, BATCH = (RECIPE[key] for key in ("learning_rate", "num_train_epochs", "per_device_train_batch_size"))
DATA, SELECTION, TRAINING, OUTPUT = "Model and data", "What is trained", "Training", "Output"


class Order(str, Enum):
    """Which end of the scores is selected."""

    top = "top"
    bottom = "bottom"


class Loss(str, Enum):
    """What the gradients that select are of."""

    task = "task"
    contrastive = "contrastive"


class Granularity(str, Enum):
    """Among which weights the best are chosen."""

    neuron = "neuron"
    layer = "layer"
    model = "model"
    block = "block"
    row = "row"
    column = "column"


class Bias(str, Enum):
    """Which biases are trained."""

    all = "all"
    with_norms = "with_norms"
    none = "none"


class Precision(str, Enum):
    """Number format of the arithmetic in training."""

    fp32 = "fp32"
    bf16 = "bf16"


def positive(value: float | None) -> float | None:
    """Refuse a number that is not positive and finite."""
    if value is not None and not 0 < value < math.inf:
        raise typer.BadParameter(f"{value} is not a positive number.")
    return value


def without(field: str) -> str:
    """Return what holds where an option of the selection is not given, for its help."""
    return f"Without it and --preset: {SELECTION_DEFAULTS[field]}."


def known_preset(value: str | None) -> str | None:
    """Refuse a name that no preset has."""
    if value is not None and value not in PRESETS:
        raise typer.BadParameter(f"{value!r} is none of {', '.join(PRESETS)}.")
    return value


ModelFlag = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER|HUB_ID|timm:NAME",
        help="Pre-trained image model. It is loaded in float32 and gets a new output head for the classes of the "
        "data. timm:NAME is one of timm's models with the weights that timm publishes, random ones if these cannot "
        "be had (which is said); timm:NAME@FILE takes the weights from a local file (.safetensors, .pth), whatever "
        "the size of its head. Without it: an embedded tiny ViT (0.9 million parameters, 32 px).",
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
        "interpolate_pos_encoding=True when it is called; a model of timm is made for the size. Without it: the "
        "model's own size.",
        rich_help_panel=DATA,
    ),
]
PresetFlag = Annotated[
    str | None,
    typer.Option(
        callback=known_preset,
        metavar="NAME",
        help=f"A published method with all its settings, training included: {', '.join(PRESETS)}. Other options "
        "replace single settings of it.",
        rich_help_panel=SELECTION,
    ),
]
BudgetFlag = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        help="Largest share of the model's parameters to train, 0 to 1: selected weights and biases together, output "
        f"head left out. Without it, --per-neuron and --preset: {DEFAULT_BUDGET}, that is {DEFAULT_BUDGET:.2%}. 0 "
        "trains biases alone.",
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


def _known_importance(name: str | None) -> str | None:
    if name is not None and name not in IMPORTANCES:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(map(repr, IMPORTANCES))}.")
    return name


ImportanceFlag = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        callback=_known_importance,
        help="How a weight is scored. "
        + "; ".join(f"{name}: {importance.help}" for name, importance in IMPORTANCES.items())
        + f". {without('importance')}",
        rich_help_panel=SELECTION,
    ),
]
OrderFlag = Annotated[
    Order | None,
    typer.Option(help=f"Select the largest or the smallest scores. {without('order')}", rich_help_panel=SELECTION),
]
LossFlag = Annotated[
    Loss | None,
    typer.Option(
        help="What gradient, fisher and sensitivity take gradients of: cross-entropy with the classes, or the "
        "supervised contrastive loss between two augmented views of each image (GPS; needs the extra views). "
        f"{without('loss')}",
        rich_help_panel=SELECTION,
    ),
]
GranularityFlag = Annotated[
    Granularity | None,
    typer.Option(
        metavar="NAME",
        help="Where the best weights are chosen. neuron: equally many per output neuron; layer: the best of each "
        "layer; model: the best of all; block: per neuron, more in blocks with large scores; row, column: whole "
        f"neurons or whole inputs. {without('granularity')}",
        rich_help_panel=SELECTION,
    ),
]
BiasFlag = Annotated[
    Bias | None,
    typer.Option(
        help=f"Train the biases of the adapted layers, those of LayerNorms besides, or none. {without('bias')}",
        rich_help_panel=SELECTION,
    ),
]
CalibrationBatchesFlag = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Batches of training images to choose from. Without it: all of them, once.",
        rich_help_panel=SELECTION,
    ),
]
EpochsFlag = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help=f"Passes over the training images. Without it and --preset: {EPOCHS}.",
        rich_help_panel=TRAINING,
    ),
]
LearningRateFlag = Annotated[
    float | None,
    typer.Option(
        callback=positive,
        metavar="RATE",
        help="Peak learning rate of Adam (no weight decay), for the selected weights and the output head alike. It "
        "rises over the first tenth of the steps and falls to 0 along a cosine, unless --preset has another schedule. "
        f"Without it and --preset: {RATE:g}.",
        rich_help_panel=TRAINING,
    ),
]
BatchSizeFlag = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help=f"Images per step and device. Without it and --preset: {BATCH}.",
        rich_help_panel=TRAINING,
    ),
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
        "and results.json (everything in the final table, and how it came about); training.png (the loss over epochs) "
        "if matplotlib is installed.",
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
