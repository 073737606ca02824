"""Which cells are to be run next. Learning rates are chosen on validation images alone."""

from collections.abc import Iterable, Mapping, Sequence

from peft_fps.benchmarks.transfer.arms import ARMS
from peft_fps.benchmarks.transfer.cells import Cell, Record, RowKey, Setting


Rates = Mapping[tuple[str, str], float | None]
"""Chosen learning rates by method and task; variants of a method have its rate."""


def pending(
    tasks: Sequence[str],
    rows: Sequence[RowKey],
    seeds: int,
    setting: Setting,
    records: Iterable[Record],
    rates: Rates | None = None,
) -> list[Cell]:
    """Return the cells that can be run now and are not among the records, in the order of running.

    Cells at a chosen learning rate follow only when all cells are there that it is chosen from.

    Args:
        tasks: names of tasks.
        rows: methods and their shares, the first ones first.
        seeds: number of seeds; 0, 1, ... are run.
        setting: says at which share learning rates are chosen.
        records: what is finished.
        rates: chosen before; there are no trials for these. Default: none.
    """
    validation = {record.cell: record.validation for record in records}
    wanted: dict[Cell, int] = {}
    for place, row in enumerate(rows):
        for task in tasks:
            cells = trials(row[0], task, setting)
            known = (rates or {}).get((ARMS[row[0]].tuned_as or row[0], task))
            if known is not None or all(cell in validation for cell in cells):
                rate = known or chosen_rate(row[0], task, setting, validation)
                cells = [Cell(task, *row, seed, rate) for seed in range(seeds)]
            for cell in cells:
                if cell not in validation:
                    wanted.setdefault(cell, place)
    return sorted(wanted, key=lambda cell: (cell.seed, wanted[cell], tasks.index(cell.task)))


def trials(method: str, task: str, setting: Setting) -> list[Cell]:
    """Return the cells that a method's learning rate on a task is chosen from, with seed 0; none of the linear head.

    Variants of a method have its trials.
    """
    tuned = ARMS[method].tuned_as or method
    share = setting.tuned_share if ARMS[tuned].budgeted else None
    return [Cell(task, tuned, share, 0, rate) for rate in ARMS[tuned].learning_rates]


def chosen_rate(method: str, task: str, setting: Setting, validation: Mapping[Cell, float]) -> float | None:
    """Return a method's learning rate on a task: the one with the best validation accuracy, the smaller of equals.

    A method keeps it for all shares and seeds. None for the linear head, which has none.

    Args:
        method: key of `ARMS`.
        task: its name.
        setting: says at which share it is chosen.
        validation: accuracies of finished cells, all trials among them.
    """
    best = max(
        trials(method, task, setting), key=lambda cell: (validation[cell], -(cell.learning_rate or 0)), default=None
    )
    return None if best is None else best.learning_rate


def chosen_rates(records: Iterable[Record], setting: Setting) -> dict[tuple[str, str], float | None]:
    """Return the learning rates of all methods on all tasks for which the trials are among the records.

    Variants are left out, since they have the rate of their method.
    """
    validation = {record.cell: record.validation for record in records}
    return {
        (method, task): chosen_rate(method, task, setting, validation)
        for method, arm in ARMS.items()
        for task in dict.fromkeys(cell.task for cell in validation)
        if arm.tuned_as is None and all(cell in validation for cell in trials(method, task, setting))
    }
