"""What one run of `peft-fps reproduce` is asked to do, and where that differs from the published recipe."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from peft_fps.config import FPSConfig
from peft_fps.presets import ADAM, PRESETS
from peft_fps.reproduce.recipes import BENCHMARKS, COMMON, TASKS, Task, find_task, published_settings
from peft_fps.vision.option_types import (
    DATA,
    OUTPUT,
    SELECTION,
    TRAINING,
    ImageColumn,
    LabelColumn,
    Overwrite,
    count,
    described,
    fraction,
    pixels,
    positive_rate,
    seed_number,
)
from peft_fps.vision.selection_options import PRESET_NAMES


METHODS = tuple(PRESETS)
PUBLISHED = ("fps", "gps")
"""Methods whose published training this is."""

PER_NEURON = (*PUBLISHED, "neuroada")
"""Methods that select K weights per output neuron, the task's K."""


RECIPE = "Recipe, where it is not to be the published one"
"""Panel of `--help`."""


def known_task(context: typer.Context, value: str) -> str:
    """Return the name of a task of the benchmark that the command is named after.

    Raises:
        typer.BadParameter: the benchmark has no such task; lists those that it has.
    """
    tasks = TASKS[str(context.info_name)]
    if value not in tasks:
        raise typer.BadParameter(f"{value!r} is no task of {BENCHMARKS[str(context.info_name)]}: {', '.join(tasks)}.")
    return value


@dataclass(frozen=True)
class ReproduceOptions:
    """The options of `peft-fps reproduce`, and the benchmark that the command is named after.

    What is None is as the recipe of the task has it; `ema=0` stands for no average.
    """

    benchmark: str
    task: Annotated[str, described("The task, see above.", DATA, metavar="NAME", callback=known_task)]
    data: Annotated[
        str,
        described(
            "A folder with the benchmark's own files (see above), or with a subfolder of the task's name that has "
            "them. Or, as for finetune: a folder with one subfolder per class or with parquet files, or a data set on "
            "the Hub, HUB_ID:CONFIG if it has several configurations.",
            DATA,
            metavar="FOLDER|HUB_ID",
        ),
    ]
    image_column: ImageColumn = None
    label_column: LabelColumn = None
    model: Annotated[
        str | None,
        described(
            "Pre-trained image model. Images are normalised as the model wants it. Default: the papers', "
            f"{COMMON['model']}, with mean and standard deviation 0.5. It needs timm: "
            'pip install "peft-fps\\[reproduce]".',
            DATA,
            metavar="FOLDER|HUB_ID",
        ),
    ] = None
    method: Annotated[
        str,
        described(
            f"How the weights are chosen: {', '.join(PRESETS)}. All are trained by the recipe, which was published "
            "for fps and gps.",
            SELECTION,
            metavar="NAME",
            callback=PRESET_NAMES,
        ),
    ] = "fps"
    train_on_all: Annotated[
        bool,
        typer.Option(
            "--train-on-all",
            help="Train on the validation images too, as the papers do, and keep the last epoch. Default: keep the "
            "epoch that is best on the validation images.",
            rich_help_panel=TRAINING,
        ),
    ] = False
    precision: Annotated[
        Literal["fp32", "fp16", "bf16"],
        described(
            "Arithmetic in training; fp16 and bf16 where they are safe (autocast). The papers have fp16, which needs "
            "a GPU.",
            RECIPE,
        ),
    ] = "fp32"
    per_neuron: Annotated[
        float | None,
        described("Selected weights per output neuron; the recipe has a K for each task.", RECIPE, metavar="K", min=0),
    ] = None
    epochs: Annotated[int | None, count("Passes over the training images; 100 in the recipe.", RECIPE)] = None
    learning_rate: Annotated[float | None, positive_rate("Peak learning rate of Adam.", RECIPE)] = None
    batch_size: Annotated[int | None, count("Images per step.", RECIPE)] = None
    warm_up: Annotated[
        float | None,
        described(
            "Share of the steps over which the learning rate rises; 0.1 in the recipe.",
            RECIPE,
            metavar="SHARE",
            callback=fraction,
        ),
    ] = None
    drop_path: Annotated[
        float | None, described("Drop-path in the last block.", RECIPE, metavar="RATE", callback=fraction)
    ] = None
    ema: Annotated[
        float | None,
        described(
            "Decay of the running average of the weights, 0 for none.", RECIPE, metavar="DECAY", callback=fraction
        ),
    ] = None
    augmentation: bool | None = None
    image_size: Annotated[int | None, pixels("Height and width; 224 in the recipe.", RECIPE)] = None
    seed: Annotated[int | None, seed_number("Seed of everything that is drawn; 42 in the recipe.", RECIPE)] = None
    limit: Annotated[int | None, count("Only the first N images of each split, for a trial.", RECIPE, least=2)] = None
    output: Annotated[
        Path | None,
        described(
            "Gets adapter/ (the PEFT adapter) and results.json (everything in the final table, all epochs, and how "
            "it came about). Default: runs/reproduce/TASK-METHOD.",
            OUTPUT,
            metavar="FOLDER",
        ),
    ] = None
    overwrite: Overwrite = False

    @property
    def folder(self) -> Path:
        """The output folder."""
        return self.output or Path("runs/reproduce") / f"{self.task}-{self.method}"

    def recipe(self) -> Task:
        """Return the recipe of the task.

        Raises:
            ValueError: there is no such task.
        """
        return find_task(self.benchmark, self.task)

    def settings(self) -> dict[str, Any]:
        """Return what the run uses: the published settings with the given options in place.

        A method whose number of weights is not a K per neuron keeps its own, so `per_neuron` is None unless given.
        """
        published = published_settings(self.recipe())
        names = {field.name for field in fields(self)} & set(published)
        used = published | {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.per_neuron is None and self.method not in PER_NEURON:
            used["per_neuron"] = None
        if self.train_on_all or not used["ema"]:
            used["ema"] = None
        return used

    def differences(self, **found: tuple[Any, Any]) -> dict[str, dict[str, Any]]:
        """Return by name what differs from the recipe, each as `recipe` and `here`.

        Args:
            found: by name, what the recipe has and what the run has, beyond options.
        """
        published, used = published_settings(self.recipe()), self.settings()
        pairs = {name: (published[name], used[name]) for name in published}
        if self.method not in PUBLISHED:
            pairs["method"] = (" or ".join(PUBLISHED), self.method)
        pairs["limit"] = (None, self.limit)
        return {
            name: {"recipe": before, "here": here}
            for name, (before, here) in (pairs | found).items()
            if before is not None and before != here or before is None and here is not None
        }

    def config(self) -> FPSConfig:
        """Return the config of the adapter, which the training arguments go along with.

        Raises:
            TypeError, ValueError: a value is not allowed.
        """
        used = self.settings()
        given = {} if used["per_neuron"] is None else {"per_neuron": used["per_neuron"]}
        return FPSConfig.preset(self.method, **given, seed=used["seed"], recipe=self.training())

    def training(self) -> dict[str, Any]:
        """Return the arguments of transformers' `TrainingArguments`."""
        used = self.settings()
        return ADAM | {
            "learning_rate": used["learning_rate"],
            "num_train_epochs": used["epochs"],
            "per_device_train_batch_size": used["batch_size"],
            "lr_scheduler_type": "cosine",
            "warmup_steps": used["warm_up"],
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the options as plain data."""
        return asdict(self) | {"output": str(self.folder)}
