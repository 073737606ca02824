"""The options of `peft-fps benchmark transfer`, `overlap` and `derive`, each with its description."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from peft_fps.benchmarks.transfer.cells import MACHINE, WHAT, Setting
from peft_fps.vision.option_types import OUTPUT, count, described, seed_number


Only = Annotated[
    str | None, described("Only these tasks, in the tables too; all if not given.", WHAT, metavar="TASK,TASK...")
]
Methods = Annotated[
    str, described("By name, or in part with *, as in 'fps*'; `--list` shows all.", WHAT, metavar="METHOD,METHOD...")
]
Seeds = Annotated[int, count("Seeds 0 to N - 1.", WHAT)]
Compared = Annotated[str, described("What the others are compared with.", WHAT, metavar="METHOD")]


@dataclass(frozen=True)
class TransferOptions(Setting):
    """The options of `peft-fps benchmark transfer`: the setting, the rows of the table, and how to run its cells."""

    only: Only = None
    methods: Methods = "linear,bitfit,full,lora,random,magnitude,fps,gps"
    budgets: Annotated[
        str,
        described(
            "Shares of the backbone's parameters to train, the output head apart.", WHAT, metavar="SHARE,SHARE..."
        ),
    ] = "0.0077"
    seeds: Seeds = 3
    baseline: Compared = "gps"
    split: Annotated[
        Literal["test", "validation"],
        described("Whose accuracies are shown. Choose between methods by `validation`.", WHAT),
    ] = "test"
    steps: Annotated[
        Path | None,
        described(
            "cost.json of `benchmark cost --rows tokens`: token selection is drawn against its step times, too, as "
            "steps.png.",
            WHAT,
            metavar="FILE",
            dir_okay=False,
        ),
    ] = None
    rates_of: Annotated[
        Path | None,
        described(
            "An earlier --output whose learning rates are taken, so that these methods need no trials here, and "
            "those that it took itself. Its epochs and precision may differ. Kept with the cells.",
            WHAT,
            metavar="FOLDER",
            file_okay=False,
        ),
    ] = None
    jobs: Annotated[int, count("Cells at the same time, each a process.", MACHINE)] = 2
    output: Annotated[
        Path,
        described(
            "Gets cells.jsonl, a line for each finished cell; transfer.md, the tables; transfer.png. A run that was "
            "stopped goes on here, and other methods, tasks or seeds are added to what is there.",
            OUTPUT,
            metavar="FOLDER",
            file_okay=False,
        ),
    ] = Path("runs/transfer")


@dataclass(frozen=True)
class OverlapOptions(Setting):
    """The options of `peft-fps benchmark overlap`; what the setting says of training has no effect."""

    only: Only = None
    methods: Methods = "fps-*-images,fps-augmented,fps-l2,fps-unweighted,magnitude,random,gps"
    budget: Annotated[float, described("Of the backbone's parameters.", WHAT, metavar="SHARE", min=0.0, max=1.0)] = (
        0.0077
    )
    seeds: Seeds = 3
    reference: Compared = "fps"
    output: Annotated[
        Path,
        described(
            "Gets overlap.json and overlap.md; those of an earlier run are replaced.",
            OUTPUT,
            metavar="FOLDER",
            file_okay=False,
        ),
    ] = Path("runs/overlap")


@dataclass(frozen=True)
class DeriveOptions:
    """The options of `peft-fps benchmark derive`."""

    tasks: Annotated[
        Path,
        described(
            "Holds a folder for each task that others are made of: dtd10, eth80_azimuth, flowers102, "
            "omniglot100, rsscn7, tinyin_size.",
            WHAT,
            metavar="FOLDER",
            file_okay=False,
        ),
    ] = Path("tasks")
    seed: Annotated[int, seed_number("Of classes, places, angles and so on.", WHAT)] = 0
    output: Annotated[
        Path,
        described("Gets a folder for each task that is made.", OUTPUT, metavar="FOLDER", file_okay=False),
    ] = Path("runs/tasks")


def listed(value: str) -> tuple[str, ...]:
    """Split an option's value at commas, without spaces and empty parts."""
    return tuple(name.strip() for name in value.split(",") if name.strip())
