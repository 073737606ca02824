"""Finished cells, made by hand or at random, and what must come out of a cell again."""

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from peft_fps.benchmarks.transfer.arms import ARMS
from peft_fps.benchmarks.transfer.cells import Cell, Record, Setting
from tests.support.helpers import CHARACTERS


SHARE = 0.05
SETTING = Setting("models/tiny", "tasks", tuned_share=SHARE)
GROUPS = {"a": "structured", "b": "natural", "c": "natural"}
BEST, OTHER = 0.01, 0.03
"""Learning rates of the methods that train few entries: what `chosen` makes the best one if not told, and another."""


def record(
    method: str,
    task: str = "a",
    seed: int = 0,
    test: float = 0.5,
    share: float | None = 0.05,
    rate: float | None = BEST,
    validation: float = 0.5,
    **changes: Any,
) -> Record:
    numbers: dict[str, Any] = {
        "trained": 50,
        "head": 20,
        "backbone": 1000,
        "seconds": {"select": 1.0, "train": 2.0},
        "bytes": {"select": 2**20, "train": 2**21, "adapter": 1024},
        "loss": 0.5,
    }
    return Record(Cell(task, method, share, seed, rate), GROUPS[task], validation, test, **(numbers | changes))


def chosen(method: str, task: str = "a", test: float = 0.5, best: float | None = None, **changes: Any) -> list[Record]:
    """The cells that a method's rate on a task is chosen from; `test` is of the best one, others are perfect.

    The best one is the middle one if not named.
    """
    share = SETTING.tuned_share if ARMS[method].budgeted else None
    rates = ARMS[method].learning_rates
    best = best or sorted(rates)[1]
    return [
        record(
            method,
            task,
            test=test if rate == best else 1.0,
            share=share,
            rate=rate,
            validation=0.9 if rate == best else 0.1,
            **changes,
        )
        for rate in rates
    ]


def results(record: Record) -> Record:
    """What must come out again; peaks of bytes depend a little on when memory of before is freed."""
    return replace(record, seconds={}, bytes={"adapter": record.bytes["adapter"]})


UNIT = st.floats(0, 1)
NAMES = st.text(CHARACTERS, max_size=5)
COUNT = st.integers(0, 2**40)

CELLS = st.builds(
    Cell,
    task=NAMES,
    method=NAMES,
    share=st.none() | UNIT,
    seed=st.integers(0, 9),
    learning_rate=st.none() | UNIT,
)
RECORDS = st.builds(
    Record,
    cell=CELLS,
    group=NAMES,
    validation=UNIT,
    test=UNIT,
    trained=COUNT,
    head=COUNT,
    backbone=COUNT,
    seconds=st.fixed_dictionaries({"select": UNIT, "train": UNIT}),
    bytes=st.fixed_dictionaries({"select": COUNT, "train": COUNT, "adapter": COUNT}),
    loss=st.none() | st.floats(allow_nan=False, allow_infinity=False),
)
