"""Which cells are to be run next. Learning rates are chosen on validation images alone."""

from collections.abc import Iterable, Sequence

from peft_fps.benchmarks.transfer.arms import ARMS
from peft_fps.benchmarks.transfer.cells import Cell, Record, RowKey, Setting


def pending(
    tasks: Sequence[str], rows: Sequence[RowKey], seeds: int, setting: Setting, records: Iterable[Record]
) -> list[Cell]:
    """Return the cells that can be run now and are not among the records, in the order of running.

    Cells at a method's chosen learning rate follow only when all cells are there that it is chosen from.

    Args:
        tasks: names of tasks.
        rows: methods and their shares, the first ones first.
        seeds: number of seeds; 0, 1, ... are run.
        setting: says which tasks learning rates are chosen on.
        records: what is finished.
    """
    done = list(records)
    finished = {record.cell for record in done}
    wanted: dict[Cell, RowKey] = {}
    for row in rows:
        tried = trials(row[0], setting)
        if finished.issuperset(tried):
            rate = chosen_rate(row[0], setting, done)
            cells = [Cell(task, *row, seed, rate) for seed in range(seeds) for task in tasks]
        else:
            cells = tried
        wanted |= {cell: row for cell in cells if cell not in finished and cell not in wanted}
    order = {task: place for place, task in enumerate(dict.fromkeys([*setting.tuned_on, *tasks]))}
    return sorted(wanted, key=lambda cell: (cell.seed, rows.index(wanted[cell]), order[cell.task]))


def trials(method: str, setting: Setting) -> list[Cell]:
    """Return the cells that a method's learning rate is chosen from; none if there is nothing to choose."""
    tuned = ARMS[method].tuned_as or method
    arm = ARMS[tuned]
    share = setting.tuned_share if arm.budgeted else None
    rates = arm.learning_rates if len(arm.learning_rates) > 1 else ()
    return [Cell(task, tuned, share, 0, rate) for rate in rates for task in setting.tuned_on]


def chosen_rate(method: str, setting: Setting, records: Iterable[Record]) -> float | None:
    """Return the learning rate with the best mean validation accuracy over the tasks it is chosen on.

    The smaller one of equals; None for a method without one. A method keeps it for all shares.

    Raises:
        ValueError: some of the cells that it is chosen from are missing.
    """
    validation = {record.cell: record.validation for record in records}
    tried = trials(method, setting)
    missing = [cell for cell in tried if cell not in validation]
    if missing:
        raise ValueError(
            f"The learning rate of {method!r} cannot be chosen: {len(missing)} of {len(tried)} cells are missing."
        )
    sums: dict[float, float] = {}
    for cell in tried:
        assert cell.learning_rate is not None
        sums[cell.learning_rate] = sums.get(cell.learning_rate, 0.0) + validation[cell]
    return max(sums, key=lambda rate: (sums[rate], -rate)) if sums else None
