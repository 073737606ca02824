"""The commands `peft-fps benchmark transfer` and `overlap` as a whole: from options to cells, tables and files."""

import logging
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from peft_fps.benchmarks.machine import processor
from peft_fps.benchmarks.tables import TextTable, titled_markdown
from peft_fps.benchmarks.transfer.arms import ARMS
from peft_fps.benchmarks.transfer.cells import RowKey, Setting
from peft_fps.benchmarks.transfer.plan import Rates, chosen_rates
from peft_fps.benchmarks.transfer.retired_arms import LAST_COMMIT
from peft_fps.benchmarks.transfer.selection_agreement import measure, overlap_table
from peft_fps.benchmarks.transfer.step_picture import draw_steps, read_steps
from peft_fps.benchmarks.transfer.store import Store, read, taken_rates
from peft_fps.benchmarks.transfer.tasks import task_names
from peft_fps.benchmarks.transfer.transfer_options import OverlapOptions, TransferOptions, listed
from peft_fps.benchmarks.transfer.transfer_picture import draw
from peft_fps.benchmarks.transfer.transfer_tables import Results, tables
from peft_fps.benchmarks.transfer.worker_pool import fill as fill_table
from peft_fps.vision.measurements import versions
from peft_fps.vision.output_folders import write_json
from peft_fps.vision.timm_names import check_timm_name


logger = logging.getLogger(__name__)

RUNNABLE = [name for name, arm in ARMS.items() if not arm.retired]
CELLS, TABLES, PICTURE, STEPS = "cells.jsonl", "transfer.md", "transfer.png", "steps.png"


def run(options: TransferOptions, fill: bool) -> tuple[list[TextTable], list[Path]]:
    """Run the cells that are missing, and write the tables of all that are there.

    Args:
        options: of the command.
        fill: whether missing cells are run.

    Returns:
        The tables, of the tasks that were asked for, and the files that were written.

    Raises:
        ValueError: an option names something that there is not, or the output folder holds another setting's cells.
    """
    rows = table_rows(listed(options.methods), listed(options.budgets))
    check_method("--baseline", options.baseline)
    setting, only = options.setting, _only(options)
    check_share("--tuned-share", setting.tuned_share)
    seconds = None if options.steps is None else read_steps(options.steps)
    if fill:
        check_runnable(rows)
        check_timm_name("--model", setting.model)
        tasks = chosen_tasks(setting, only)
        rates = None if options.rates_of is None else earlier_rates(options.rates_of, setting)
        store = Store(options.output / CELLS, setting, {"processor": processor(), "versions": versions()}, rates)
        fill_table(tasks, rows, options.seeds, setting, store, options.jobs)
    elif (options.output / CELLS).exists():
        store = Store(options.output / CELLS, setting, {})
    else:
        raise ValueError(f"--output is {str(options.output)!r}, which holds no {CELLS}: nothing has been run there.")
    shown = [record for record in store.records if only is None or record.cell.task in only]
    results = Results(shown, setting, store.rates, options.split)
    found = tables(results, options.baseline)
    written = [options.output / CELLS, options.output / TABLES]
    written[1].write_text("\n\n".join(map(titled_markdown, found)) + "\n", encoding="utf-8")
    if results.shares:
        try:
            draw(results, options.output / PICTURE)
            written.append(options.output / PICTURE)
            if seconds is not None:
                draw_steps(results, seconds, options.output / STEPS)
                written.append(options.output / STEPS)
        except ImportError:
            logger.warning("no picture, since matplotlib is missing: pip install peft-fps[benchmark]")
    return found, written


def earlier_rates(folder: Path, setting: Setting) -> Rates:
    """Return the learning rates that another run has chosen, or has taken from one before it.

    Raises:
        ValueError: there is no run in the folder.
    """
    if not (folder / CELLS).exists():
        raise ValueError(f"--rates-of is {str(folder)!r}, which holds no {CELLS}: nothing has been run there.")
    header, records = read(folder / CELLS)
    return taken_rates(header) | chosen_rates(records, setting)


def run_overlap(options: OverlapOptions) -> tuple[TextTable, list[Path]]:
    """Compare selections, and write the table.

    Args:
        options: of the command.

    Returns:
        The table, and the files that were written.

    Raises:
        ValueError: an option names something that there is not.
    """
    setting, share, seeds = options.setting, options.budget, options.seeds
    tasks = chosen_tasks(setting, _only(options))
    check_method("--reference", options.reference)
    check_timm_name("--model", setting.model)
    check_share("--budget", share)
    rows = table_rows([options.reference, *listed(options.methods)], [str(share)])
    check_runnable(rows)
    agreements = measure(setting, tasks, [method for method, _ in rows], options.reference, share, seeds)
    table = overlap_table(agreements, share)
    options.output.mkdir(parents=True, exist_ok=True)
    written = [options.output / "overlap.json", options.output / "overlap.md"]
    facts = {"setting": setting.comparable(), "tasks": tasks, "share": share, "seeds": seeds, "versions": versions()}
    write_json(written[0], facts | {"agreements": [found.to_dict() for found in agreements]})
    written[1].write_text(titled_markdown(table) + "\n", encoding="utf-8")
    return table, written


def _only(options: TransferOptions | OverlapOptions) -> tuple[str, ...] | None:
    """Return the names of the tasks that were asked for, None for all."""
    return None if options.only is None else listed(options.only)


def chosen_tasks(setting: Setting, only: Sequence[str] | None) -> list[str]:
    """Return the tasks to run, each once, all that there are if `only` is None.

    Args:
        setting: says where they are.
        only: names of tasks.

    Raises:
        ValueError: some are not there, or there are none.
    """
    known = task_names(Path(setting.tasks))
    tasks = list(dict.fromkeys(only)) if only is not None else known
    if not tasks:
        raise ValueError(f"--only is empty, expected some of {', '.join(known)}.")
    unknown = [task for task in tasks if task not in known]
    if unknown:
        raise ValueError(
            f"{', '.join(unknown)}: no such task in {setting.tasks}, expected some of {', '.join(known)}. Name them "
            "with --only."
        )
    return tasks


def check_share(option: str, share: float) -> None:
    """Raise ValueError unless an option's value is above 0 and at most 1."""
    if not 0 < share <= 1:
        raise ValueError(f"{option} is {share}, expected a share above 0 and up to 1.")


def check_method(option: str, method: str) -> None:
    """Raise ValueError unless an option names a method in full."""
    if method not in ARMS:
        raise ValueError(f"{option} is {method!r}, expected one of {', '.join(RUNNABLE)}.")


def check_runnable(rows: Sequence[RowKey]) -> None:
    """Raise ValueError if a method of these rows has left the package."""
    retired = list(dict.fromkeys(method for method, _ in rows if ARMS[method].retired))
    if retired:
        raise ValueError(
            f"--methods has {', '.join(retired)}, which did not win and left the package, expected methods that "
            "`peft-fps benchmark transfer --list` shows. Take it away: --report still shows its finished cells, and "
            f"the repository's commit {LAST_COMMIT} still runs it."
        )


def table_rows(methods: Sequence[str], budgets: Sequence[str]) -> list[RowKey]:
    """Return the rows that are asked for: every method with every budget, once for a method that has no choice.

    Raises:
        ValueError: there is no such method, or a budget is no share, or there are none.
    """
    shares = []
    for budget in budgets:
        try:
            share = float(budget)
        except ValueError:
            share = -1.0
        if not 0 < share <= 1:
            raise ValueError(f"--budgets has {budget!r}, expected shares above 0 and up to 1.")
        shares.append(share)
    if not shares:
        raise ValueError("--budgets is empty, expected at least one share.")
    if not methods:
        raise ValueError(f"--methods is empty, expected some of {', '.join(RUNNABLE)}.")
    rows: list[RowKey] = []
    for pattern in methods:
        matching = [
            name for name in ARMS if fnmatchcase(name, pattern) and (name == pattern or not ARMS[name].retired)
        ]
        if not matching:
            raise ValueError(f"--methods has {pattern!r}, which is none of {', '.join(RUNNABLE)}.")
        for name in matching:
            rows += [(name, share) for share in shares] if ARMS[name].budgeted else [(name, None)]
    return list(dict.fromkeys(rows))
