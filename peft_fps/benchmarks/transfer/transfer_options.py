"""The options of `peft-fps benchmark transfer`, `overlap` and `derive`, each with its description."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from peft_fps.benchmarks.transfer.cells import MACHINE, WHAT, Setting
from peft_fps.vision.option_types import OUTPUT, count, described, seed_number


MADE = "What is made"
"""Panel of `--help`."""

Only = Annotated[
    str | None, described("Only these tasks, in the tables too. Default: all.", WHAT, metavar="TASK,TASK...")
]
Methods = Annotated[
    str,
    described(
        "By name, or in part with *, as in 'fps*'. `peft-fps benchmark transfer --list` shows all.",
        WHAT,
        metavar="METHOD,METHOD...",
    ),
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
        described("Images whose accuracies are shown. Choose between methods by `validation`.", WHAT),
    ] = "test"
    steps: Annotated[
        Path | None,
        described(
            "cost.json of `peft-fps benchmark cost --rows tokens`. steps.png then shows the accuracy of token "
            "selection against the time of its steps.",
            WHAT,
            metavar="FILE",
            dir_okay=False,
        ),
    ] = None
    rates_of: Annotated[
        Path | None,
        described(
            "Take learning rates from an earlier --output, including those it took from another run. Methods with "
            "such a rate need no trials. Epochs and precision of that run may differ. The rates are kept with the "
            "cells.",
            WHAT,
            metavar="FOLDER",
            file_okay=False,
        ),
    ] = None
    jobs: Annotated[int, count("Cells at the same time, each a process.", MACHINE)] = 2
    output: Annotated[
        Path,
        described(
            "Gets cells.jsonl (a line for each finished cell), transfer.md (the tables) and transfer.png. A run that "
            "was stopped goes on here. Other methods, tasks or seeds are added to what is there.",
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
    budget: Annotated[
        float, described("Share of the backbone's parameters to select.", WHAT, metavar="SHARE", min=0.0, max=1.0)
    ] = 0.0077
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
            "Holds a folder for each task that others are made of: dtd10, eth80_azimuth, flowers102, omniglot100, "
            "rsscn7, tinyin_size.",
            MADE,
            metavar="FOLDER",
            file_okay=False,
        ),
    ] = Path("tasks")
    seed: Annotated[int, seed_number("Seed of classes, places, angles and so on.", MADE)] = 0
    output: Annotated[
        Path,
        described("Gets a folder for each task that is made.", OUTPUT, metavar="FOLDER", file_okay=False),
    ] = Path("runs/tasks")


def listed(value: str) -> tuple[str, ...]:
    """Split an option's value at commas, without spaces and empty parts."""
    return tuple(name.strip() for name in value.split(",") if name.strip())
