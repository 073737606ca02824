"""Which cells are to be run next. Learning rates are chosen on validation images alone."""

from collections.abc import Iterable, Mapping, Sequence

from peft_fps.benchmarks.transfer.arms import ARMS, RATES
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
    validation = {record.cell: record.validation for record in records}
    wanted: dict[Cell, RowKey] = {}
    for row in rows:
        cells = trials(row[0], setting, validation)
        if all(cell in validation for cell in cells):
            rate = best_rate(cells, validation)
            cells = [Cell(task, *row, seed, rate) for seed in range(seeds) for task in tasks]
        wanted |= {cell: row for cell in cells if cell not in validation and cell not in wanted}
    order = {task: place for place, task in enumerate(dict.fromkeys([*setting.tuned_on, *tasks]))}
    return sorted(wanted, key=lambda cell: (cell.seed, rows.index(wanted[cell]), order[cell.task]))


def trials(method: str, setting: Setting, validation: Mapping[Cell, float]) -> list[Cell]:
    """Return the cells that a method's learning rate is chosen from; none if there is nothing to choose.

    At first those of three rates. As long as the best of them is the largest or the smallest, the next one of
    `RATES` in that direction is tried too.

    Args:
        method: key of `ARMS`; variants of a method have its trials.
        setting: says on which tasks.
        validation: accuracies of finished cells. While some of the cells that are returned are not among them, they
            are all that can be said by now.
    """
    tuned = ARMS[method].tuned_as or method
    arm = ARMS[tuned]
    share = setting.tuned_share if arm.budgeted else None
    if not arm.learning_rates:
        return []
    first, last = RATES.index(arm.learning_rates[0]), RATES.index(arm.learning_rates[-1])
    while True:
        cells = [Cell(task, tuned, share, 0, rate) for rate in RATES[first : last + 1] for task in setting.tuned_on]
        if any(cell not in validation for cell in cells):
            return cells
        best = best_rate(cells, validation)
        if best == RATES[last] and last + 1 < len(RATES):
            last += 1
        elif best == RATES[first] and first > 0:
            first -= 1
        else:
            return cells


def chosen_rate(method: str, setting: Setting, records: Iterable[Record]) -> float | None:
    """Return the learning rate with the best mean validation accuracy over the tasks it is chosen on.

    The smaller one of equals; None for a method without one. A method keeps it for all shares.

    Raises:
        ValueError: some of the cells that it is chosen from are missing.
    """
    validation = {record.cell: record.validation for record in records}
    tried = trials(method, setting, validation)
    missing = [cell for cell in tried if cell not in validation]
    if missing:
        raise ValueError(
            f"The learning rate of {method!r} cannot be chosen: {len(missing)} of {len(tried)} cells are missing."
        )
    return best_rate(tried, validation)


def best_rate(cells: Iterable[Cell], validation: Mapping[Cell, float]) -> float | None:
    """Return the learning rate with the largest sum of accuracies, the smaller one of equals; None of no cells."""
    sums: dict[float, float] = {}
    for cell in cells:
        assert cell.learning_rate is not None
        sums[cell.learning_rate] = sums.get(cell.learning_rate, 0.0) + validation[cell]
    return max(sums, key=lambda rate: (sums[rate], -rate)) if sums else None
