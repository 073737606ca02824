"""What one run of `peft-fps finetune` is asked to do."""

import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from peft_fps.vision.timm_names import PREFIX, check_timm_name, local_path
from peft_fps.config import FPSConfig


DEFAULT_MODEL = Path(__file__).parent / "default_model"
RESULTS, ADAPTER, MERGED, BASE, PICTURE = "results.json", "adapter", "merged", "base", "training.png"

RECIPE: dict[str, Any] = {
    "learning_rate": 1e-2,
    "weight_decay": 0.0,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "num_train_epochs": 30,
    "per_device_train_batch_size": 32,
}
"""How to train without a preset: arguments of transformers' `TrainingArguments`."""

SELECTION_FIELDS = ("budget", "per_neuron", "importance", "order", "loss", "granularity", "bias")
"""Options that are fields of the config."""

SELECTION_DEFAULTS: dict[str, Any] = {
    field.name: field.default for field in fields(FPSConfig) if field.name in SELECTION_FIELDS
}

TRAINING_ARGUMENTS = {
    "learning_rate": "learning_rate",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
}
"""Options that are training arguments, and their names there."""


@dataclass(frozen=True)
class FinetuneOptions:
    """The options of `peft-fps finetune`, named as on the command line, where each is explained.

    `model=None` and `data=None` stand for the embedded model and the embedded digits. What is None among the options
    of selection and training is as the preset has it, or else as the defaults of the config and `RECIPE`.
    """

    model: str | None = None
    data: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    image_size: int | None = None
    preset: str | None = None
    budget: float | None = None
    per_neuron: float | None = None
    importance: str | None = None
    order: str | None = None
    loss: str | None = None
    granularity: str | None = None
    bias: str | None = None
    calibration_batches: int | None = None
    epochs: int | None = None
    learning_rate: float | None = None
    batch_size: int | None = None
    precision: str = "fp32"
    seed: int = 0
    output: Path = Path("runs/finetune")
    overwrite: bool = False

    def fps_config(self) -> FPSConfig:
        """Return the config of the adapter; with a preset, its `recipe` is what is trained by.

        Raises:
            TypeError, ValueError: a value is not allowed, or two contradict each other.
        """
        given = {name: getattr(self, name) for name in SELECTION_FIELDS if getattr(self, name) is not None}
        if self.preset is None:
            return FPSConfig(**given, seed=self.seed)
        config = FPSConfig.preset(self.preset, **given, seed=self.seed)
        config.recipe = self.recipe(config)
        return config

    def recipe(self, config: FPSConfig) -> dict[str, Any]:
        """Return the training arguments: those of the config, or else of `RECIPE`, with the given options in place."""
        given = {
            TRAINING_ARGUMENTS[name]: getattr(self, name)
            for name in TRAINING_ARGUMENTS
            if getattr(self, name) is not None
        }
        return (config.recipe or RECIPE) | given

    def to_dict(self) -> dict[str, Any]:
        """Return the options as plain data."""
        return asdict(self) | {"output": str(self.output)}

    def check_paths(self) -> None:
        """Look at the paths before anything is loaded.

        Raises:
            ImportError: the model is timm's by name, and timm cannot be imported.
            ValueError: the model or the data cannot be there, or the output folder holds something and `overwrite` is
                off.
        """
        for option, value in (("--model", self.model), ("--data", self.data)):
            if value is not None:
                check_path(option, value)
                if self.overwrite and self.output.resolve() in local_path(value).resolve().parents:
                    raise ValueError(f"{option} is {value!r}, which lies in the folder to be overwritten.")
        if self.output.exists() and not self.output.is_dir():
            raise ValueError(f"--output is {str(self.output)!r}, which is a file, expected a folder.")
        if self.output.is_dir() and any(self.output.iterdir()) and not self.overwrite:
            raise ValueError(
                f"--output is {str(self.output)!r}, which is not empty: choose another folder or add --overwrite."
            )
        self.output.mkdir(parents=True, exist_ok=True)

    def clear_output(self) -> None:
        """Remove what an earlier run of this command left in the output folder, and nothing else."""
        for name in (ADAPTER, MERGED, BASE):
            shutil.rmtree(self.output / name, ignore_errors=True)
        for name in (RESULTS, PICTURE):
            (self.output / name).unlink(missing_ok=True)


def check_path(option: str, value: str) -> None:
    """Refuse a value that can only be meant as a local path and does not exist.

    Anything else that does not exist may be the name of something on the Hub, `name` or `owner/name`, and as a model
    the name of one of timm's.
    """
    if value.startswith(PREFIX):
        if option != "--model":
            raise ValueError(
                f"{option} is {value!r}, a timm model by its name, which does not tell its weights and the size of "
                "its images. Give a folder: `peft-fps finetune` writes one to OUTPUT/base."
            )
        check_timm_name(option, value)
        return
    written_as_path = value.startswith(("/", ".", "~", "\\")) or value.count("/") > 1
    if written_as_path and not Path(value).expanduser().exists():
        raise ValueError(f"{option} is {value!r}: there is no such file or folder.")
