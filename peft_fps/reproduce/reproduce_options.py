"""What one run of `peft-fps reproduce` is asked to do, and where that differs from the published recipe."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from peft_fps.vision.finetune_options import FinetuneOptions
from peft_fps.config import FPSConfig
from peft_fps.presets import ADAM, PRESETS
from peft_fps.reproduce.recipes import Task, find_task, published_settings


METHODS = tuple(PRESETS)
PUBLISHED = ("fps", "gps")
"""Methods whose published training this is."""

PER_NEURON = (*PUBLISHED, "neuroada")
"""Methods that select K weights per output neuron, the task's K."""


@dataclass(frozen=True)
class ReproduceOptions:
    """The options of `peft-fps reproduce`, named as on the command line, where each is explained.

    What is None is as the recipe of the task has it; `ema=0` stands for no average.
    """

    benchmark: str
    task: str
    data: str
    method: str = "fps"
    train_on_all: bool = False
    limit: int | None = None
    image_column: str | None = None
    label_column: str | None = None
    model: str | None = None
    image_size: int | None = None
    per_neuron: float | None = None
    epochs: int | None = None
    learning_rate: float | None = None
    batch_size: int | None = None
    warm_up: float | None = None
    drop_path: float | None = None
    ema: float | None = None
    augmentation: bool | None = None
    precision: str = "fp32"
    seed: int | None = None
    output: Path = Path("runs/reproduce")
    overwrite: bool = False

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

    def shared(self) -> FinetuneOptions:
        """Return what `peft-fps finetune` shares with this command: model, data, paths, precision and seed."""
        used = self.settings()
        return FinetuneOptions(
            model=used["model"],
            data=self.data,
            # the Trainer is told of fp16 by itself
            precision="bf16" if self.precision == "bf16" else "fp32",
            seed=used["seed"],
            output=self.output,
            overwrite=self.overwrite,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the options as plain data."""
        return asdict(self) | {"output": str(self.output)}
