"""What is run: the setting of a whole table, and one cell of it."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft_fps.vision.timm_names import timm_name


@dataclass(frozen=True)
class Setting:
    """What all cells of a table have in common.

    Attributes:
        model: folder of the pre-trained model, or its name on the Hub.
        tasks: folder with one folder per task.
        image_size: height and width of the images, in pixels.
        epochs: passes over the training images.
        batch_size: images per step.
        precision: `"fp32"`, or `"bf16"` for autocast.
        threads: CPU threads of one cell; another number may change the last digits.
        tuned_share: share of trained parameters at which learning rates are chosen.
    """

    model: str
    tasks: str
    image_size: int = 112
    epochs: int = 5
    batch_size: int = 16
    precision: str = "bf16"
    threads: int = 1
    tuned_share: float = 0.0077

    def comparable(self) -> dict[str, Any]:
        """Return what results depend on, as plain data: not in which folders model and tasks lie."""
        named = timm_name(self.model)
        model = Path(self.model).name if named is None else named.without_folder
        found = asdict(self) | {"model": model}
        return {key: value for key, value in found.items() if key != "tasks"}


@dataclass(frozen=True)
class Cell:
    """One method on one task.

    Attributes:
        task: name of its folder.
        method: key of `peft_fps.benchmarks.transfer.arms.ARMS`.
        share: of the backbone's parameters that may be trained; None for methods that have no choice.
        seed: of the new output head, the order of the images, and whatever else is random.
        learning_rate: None for the linear head, which has none.
    """

    task: str
    method: str
    share: float | None
    seed: int
    learning_rate: float | None

    @property
    def row(self) -> "RowKey":
        """The row of the table that it belongs to."""
        return self.method, self.share


RowKey = tuple[str, float | None]
"""A method and its share of trained parameters."""


@dataclass(frozen=True)
class Record:
    """A cell and what came out of it.

    Attributes:
        cell: what was run.
        group: of tasks, as the task's `meta.json` says.
        validation: accuracy on the validation split, the only thing that a choice may depend on.
        test: accuracy on the test split, read once, after training.
        trained: parameters trained, the output head left out.
        head: parameters of the output head.
        backbone: parameters of the model without its head.
        seconds: wall time by stage, `select` and `train`.
        bytes: peak of tensors by stage beyond those that were there before it, and `adapter`, the size of its file.
        loss: mean training loss; None for the linear head, and where training diverged.
    """

    cell: Cell
    group: str
    validation: float
    test: float
    trained: int
    head: int
    backbone: int
    seconds: dict[str, float]
    bytes: dict[str, int]
    loss: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return one level of plain data, `seconds` and `bytes` aside."""
        fields = asdict(self)
        return fields.pop("cell") | fields

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Record":
        """Undo `to_dict`."""
        rest = dict(data)
        cell = Cell(**{name: rest.pop(name) for name in ("task", "method", "share", "seed", "learning_rate")})
        return cls(cell=cell, **rest)
