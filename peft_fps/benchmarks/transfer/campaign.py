"""From the options of `peft-fps benchmark transfer` to cells, tables and files."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from peft_fps.benchmarks.machine import processor
from peft_fps.benchmarks.cost.cost_tables import Table, markdown_table
from peft_fps.benchmarks.transfer.arms import ARMS
from peft_fps.benchmarks.transfer.cells import RowKey, Setting
from peft_fps.benchmarks.transfer.selection_agreement import measure, overlap_table
from peft_fps.benchmarks.transfer.transfer_picture import draw
from peft_fps.benchmarks.transfer.transfer_tables import Results, tables
from peft_fps.benchmarks.transfer.store import Store
from peft_fps.benchmarks.transfer.worker_pool import fill as fill_table
from peft_fps.benchmarks.transfer.tasks import task_names
from peft_fps.vision.measurements import versions
from peft_fps.vision.timm_names import check_timm_name


logger = logging.getLogger(__name__)

CELLS, TABLES, PICTURE = "cells.jsonl", "transfer.md", "transfer.png"


@dataclass(frozen=True)
class TransferOptions:
    """The options, named as on the command line, where each is explained."""

    setting: Setting
    methods: Sequence[str]
    budgets: Sequence[str]
    only: Sequence[str] | None
    seeds: int
    baseline: str
    jobs: int
    output: Path


def run(options: TransferOptions, fill: bool) -> tuple[list[Table], list[Path]]:
    """Run the cells that are missing, and write and return the tables of all that are there, on the tasks asked for.

    Raises:
        ValueError: an option names something that there is not; the output folder holds another setting's cells.
    """
    rows = table_rows(options.methods, options.budgets)
    check_method("--baseline", options.baseline)
    setting = options.setting
    if not 0 < setting.tuned_share <= 1:
        raise ValueError(f"--tuned-share is {setting.tuned_share}, expected a share above 0 and up to 1.")
    if fill:
        check_timm_name("--model", setting.model)
        tasks = chosen_tasks(setting, options.only)
        store = Store(options.output / CELLS, setting, {"processor": processor(), "versions": versions()})
        fill_table(tasks, rows, options.seeds, setting, store, options.jobs)
    elif (options.output / CELLS).exists():
        store = Store(options.output / CELLS, setting, {})
    else:
        raise ValueError(f"--output is {str(options.output)!r}, which holds no {CELLS}: nothing has been run there.")
    shown = [record for record in store.records if options.only is None or record.cell.task in options.only]
    results = Results(shown, setting)
    found = tables(results, options.baseline)
    texts = [f"**{table.title}**\n\n{markdown_table(table)}" for table in found]
    written = [options.output / CELLS, options.output / TABLES]
    written[1].write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    if results.shares:
        try:
            draw(results, options.output / PICTURE)
            written.append(options.output / PICTURE)
        except ImportError:
            logger.warning("no picture, since matplotlib is missing: pip install peft-fps[benchmark]")
    return found, written


def run_overlap(
    setting: Setting,
    only: Sequence[str] | None,
    methods: Sequence[str],
    reference: str,
    share: float,
    seeds: int,
    output: Path,
) -> tuple[Table, list[Path]]:
    """Compare selections, and write and return the table; see `peft-fps benchmark overlap` for the options.

    Raises:
        ValueError: an option names something that there is not.
    """
    tasks = chosen_tasks(setting, only)
    check_method("--reference", reference)
    check_timm_name("--model", setting.model)
    if not 0 < share <= 1:
        raise ValueError(f"--budget is {share}, expected a share above 0 and up to 1.")
    rows = [method for method, _ in table_rows([reference, *methods], [str(share)])]
    agreements = measure(setting, tasks, rows, reference, share, seeds)
    table = overlap_table(agreements, share)
    output.mkdir(parents=True, exist_ok=True)
    written = [output / "overlap.json", output / "overlap.md"]
    facts = {"setting": setting.comparable(), "tasks": tasks, "share": share, "seeds": seeds, "versions": versions()}
    content = facts | {"agreements": [found.to_dict() for found in agreements]}
    written[0].write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    written[1].write_text(f"**{table.title}**\n\n{markdown_table(table)}\n", encoding="utf-8")
    return table, written


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


def check_method(option: str, method: str) -> None:
    """Raise ValueError unless an option names a method in full."""
    if method not in ARMS:
        raise ValueError(f"{option} is {method!r}, expected one of {', '.join(ARMS)}.")


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
        raise ValueError(f"--methods is empty, expected some of {', '.join(ARMS)}.")
    rows: list[RowKey] = []
    for pattern in methods:
        matching = [name for name in ARMS if fnmatchcase(name, pattern)]
        if not matching:
            raise ValueError(f"--methods has {pattern!r}, which is none of {', '.join(ARMS)}.")
        for name in matching:
            rows += [(name, share) for share in shares] if ARMS[name].budgeted else [(name, None)]
    return list(dict.fromkeys(rows))
