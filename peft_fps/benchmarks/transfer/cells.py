"""What is run: the setting of a whole table, and one cell of it."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from peft_fps.vision.option_types import Precision, count, described, pixels
from peft_fps.vision.timm_names import timm_name


WHAT, HOW, MACHINE = "What is compared", "How it is trained", "Machine"
"""Panels of `--help`."""


@dataclass(frozen=True)
class Setting:
    """What all cells of a table have in common; the fields are options of `peft-fps benchmark transfer`.

    Another number of threads may change the last digits of an accuracy.
    """

    model: Annotated[
        str,
        described(
            "A pre-trained image classification model, or a text encoder; timm:NAME as in peft-fps finetune.",
            WHAT,
            metavar="FOLDER|HUB_ID|timm:NAME",
        ),
    ] = "WinKawaks/vit-tiny-patch16-224"
    tasks: Annotated[
        str,
        described(
            "Holds a folder for each task, with labelled images in the splits train, validation and test, as "
            "`peft-fps finetune --data` takes them, or with parquet files of the columns `text` and `label`. A "
            "`meta.json` beside them may name the task's `group`, and names the `classes` of texts.",
            WHAT,
            metavar="FOLDER",
        ),
    ] = "tasks"
    tuned_share: Annotated[
        float,
        described(
            "Share of trained parameters at which learning rates are tuned, for every task, with seed 0.",
            HOW,
            metavar="SHARE",
            min=0.0,
            max=1.0,
        ),
    ] = 0.0077
    image_size: Annotated[int, pixels("Height and width of the images.", HOW, least=8)] = 112
    epochs: Annotated[int, count("Passes over the examples.", HOW)] = 5
    batch_size: Annotated[int, count("Examples per step.", HOW)] = 16
    precision: Annotated[
        Precision,
        described(
            "Arithmetic of training; weights stay in float32. bf16 is many times slower on CPUs without bfloat16 "
            "instructions.",
            HOW,
        ),
    ] = "bf16"
    attention: Annotated[
        Literal["sdpa", "eager"],
        described(
            "Which of transformers' implementations a model's attention uses. On a CPU with bfloat16 instructions, a "
            "bf16 step of the default model took 3/4 of the time with `eager`.",
            HOW,
        ),
    ] = "sdpa"
    threads: Annotated[int, count("CPU threads of each cell.", MACHINE)] = 1

    @property
    def setting(self) -> "Setting":
        """The setting without what a subclass adds."""
        return Setting(**{field.name: getattr(self, field.name) for field in fields(Setting)})

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
        operations: of a forward pass beyond the base model's, as a share of the base model's; 0 in
            older files, whose methods all merge without a trace.
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
    operations: float = 0.0

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
