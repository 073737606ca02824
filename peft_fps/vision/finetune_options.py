"""What one run of `peft-fps finetune` is asked to do: its options, each with its description."""

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from peft_fps.config import FPSConfig
from peft_fps.vision.default_training import BATCH, LEAST_STEPS, MOST_STEPS, RECIPE, TRAINING_ARGUMENTS, TRIED_RATES
from peft_fps.vision.option_types import (
    AUTO,
    DATA,
    OUTPUT,
    SELECTION,
    TRAINING,
    ImageColumn,
    LabelColumn,
    Overwrite,
    Precision,
    count,
    described,
    pixels,
    positive_rate,
    rate_or_auto,
    seed_number,
)
from peft_fps.vision.selection_options import (
    SELECTION_FIELDS,
    Bias,
    Budget,
    Granularity,
    ImportanceName,
    Loss,
    Order,
    PerNeuron,
    Preset,
)


DEFAULT_MODEL = Path(__file__).parent / "default_model"

TRAINING_ONLY = ("epochs", "learning_rate", "bias_learning_rate", "head_learning_rate", "centred", "precision")
"""Options that have no say in a selection."""


@dataclass(frozen=True)
class FinetuneOptions:
    """The options of `peft-fps finetune`, of which `peft-fps select` has those that do not concern training.

    `model=None` and `data=None` stand for the embedded model and the embedded digits. What is None among the options
    of selection and training is as the preset has it, or else as the defaults of the config and `RECIPE`.
    """

    model: Annotated[
        str | None,
        described(
            "Pre-trained image model. It is loaded in float32 and gets a new output head for the classes of the "
            "data. timm:NAME is one of timm's models with the weights that timm publishes; if these cannot be had, a "
            "message says so and the weights are random. timm:NAME@FILE takes the weights from a local file "
            "(.safetensors, .pth), whatever the size of its head. Default: an embedded tiny ViT (0.9 million "
            "parameters, 32 px).",
            DATA,
            metavar="FOLDER|HUB_ID|timm:NAME",
        ),
    ] = None
    data: Annotated[
        str | None,
        described(
            "Labelled images: a folder with one subfolder per class (below train/, validation/, test/ where there "
            "are splits), a folder with parquet files (train*.parquet, validation*.parquet, test*.parquet), a folder "
            "written by save_to_disk of datasets, or a data set on the Hub, HUB_ID:CONFIG if it has several "
            "configurations. Splits that are missing are drawn from those that are there. Default: scikit-learn's "
            "1,797 handwritten digits.",
            DATA,
            metavar="FOLDER|FILE|HUB_ID",
        ),
    ] = None
    image_column: ImageColumn = None
    label_column: LabelColumn = None
    image_size: Annotated[
        int | None,
        pixels(
            "Height and width of the images that the model sees; a ViT interpolates its position embeddings to it. "
            "112 instead of 224 makes a ViT about four times as fast. The merged model then wants "
            "interpolate_pos_encoding=True when it is called; a model of timm is made for the size. Default: the "
            "model's own size.",
            DATA,
        ),
    ] = None
    preset: Preset = None
    budget: Budget = None
    per_neuron: PerNeuron = None
    importance: ImportanceName = None
    order: Order = None
    loss: Loss = None
    granularity: Granularity = None
    bias: Bias = None
    calibration_batches: Annotated[
        int | None,
        count("Batches of training images by which weights are chosen. Default: all of them, once.", SELECTION),
    ] = None
    epochs: Annotated[
        int | None,
        count(
            f"Passes over the training images. Default: {RECIPE['num_train_epochs']}, unless --preset is given.",
            TRAINING,
        ),
    ] = None
    learning_rate: Annotated[
        Any,  # float, "auto" or None, which typer has no type for
        described(
            "Peak learning rate of the selected weights, by Adam without weight decay. It rises over the first tenth "
            "of the steps and falls to 0 along a cosine, unless --preset has another schedule. "
            f"auto: the best of {', '.join(f'{rate:g}' for rate in TRIED_RATES)} on the validation images, "
            f"each tried for the steps of one epoch ({LEAST_STEPS} to {MOST_STEPS}), which are undone. Default: "
            f"{RECIPE['learning_rate']:g}, unless --preset is given.",
            TRAINING,
            metavar="RATE|auto",
            parser=rate_or_auto,
        ),
    ] = None
    bias_learning_rate: Annotated[
        float | None,
        positive_rate(
            "Peak learning rate of the biases of adapted layers and norms. Default: a third of --learning-rate. With "
            "--preset, or where no weights are selected: the same as --learning-rate.",
            TRAINING,
        ),
    ] = None
    head_learning_rate: Annotated[
        float | None,
        positive_rate(
            "Peak learning rate of the output head. Default: a third of --learning-rate. With --preset, or where no "
            "weights are selected: the same as --learning-rate.",
            TRAINING,
        ),
    ] = None
    centred: Annotated[
        bool | None,
        typer.Option(
            "--centred/--not-centred",
            help="Train selected weights as if their inputs had the mean 0; biases take over the shift of outputs. "
            "Layers without a trained bias are trained as they are. The saved adapter is an ordinary one. Default: "
            "centred where possible; with --preset not centred.",
            show_default=False,
            rich_help_panel=TRAINING,
        ),
    ] = None
    batch_size: Annotated[
        int | None,
        count(f"Images per step and device. Default: {BATCH}, unless --preset is given.", TRAINING),
    ] = None
    precision: Annotated[
        Precision,
        described(
            "Arithmetic in training: float32, or bfloat16 where that is safe (autocast). Weights, calibration and "
            "evaluation stay in float32.",
            TRAINING,
        ),
    ] = "fp32"
    seed: Annotated[
        int,
        seed_number(
            "Seed of the output head, of the order of the images, of drawn splits and of --importance random.",
            TRAINING,
        ),
    ] = 0
    output: Annotated[
        Path,
        described(
            "Gets adapter/ (the PEFT adapter), merged/ (the model with the adapter merged, and its image processor) "
            "and results.json (everything in the final table, and how it came about); training.png (the loss over "
            "epochs) if matplotlib is installed.",
            OUTPUT,
            metavar="FOLDER",
        ),
    ] = Path("runs/finetune")
    overwrite: Overwrite = False

    def fps_config(self) -> FPSConfig:
        """Return the config of the adapter; with a preset, its `recipe` is what is trained by.

        Raises:
            TypeError, ValueError: a value is not allowed, or two contradict each other.
        """
        given = {name: getattr(self, name) for name in SELECTION_FIELDS if getattr(self, name) is not None}
        preset = FPSConfig if self.preset is None else partial(FPSConfig.preset, self.preset)
        config = preset(**given, seed=self.seed)
        if self.centred and config.bias == "none":
            raise ValueError(
                "--centred lets biases take over what entries shift, and no biases are trained, expected --bias all. "
                "Leave --centred out, or train biases."
            )
        if self.preset is not None:
            config.recipe = self.recipe(config)
        return config

    def recipe(self, config: FPSConfig) -> dict[str, Any]:
        """Return the training arguments: those of the config, or else of `RECIPE`, with the given options in place.

        A learning rate that is to be found by trials is not among them.
        """
        given = {
            TRAINING_ARGUMENTS[name]: getattr(self, name)
            for name in TRAINING_ARGUMENTS
            if getattr(self, name) not in (None, AUTO)
        }
        return (config.recipe or RECIPE) | given

    def to_dict(self) -> dict[str, Any]:
        """Return the options as plain data."""
        return asdict(self) | {"output": str(self.output)}
