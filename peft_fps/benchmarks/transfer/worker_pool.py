"""Run all cells of a table, several at a time, each in a process with its own threads."""

import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from functools import partial

import torch
from tqdm.auto import tqdm

from peft_fps.benchmarks.environment import QUIET, switched
from peft_fps.benchmarks.transfer.cell_run import run_cell
from peft_fps.benchmarks.transfer.cells import Record, RowKey, Setting
from peft_fps.benchmarks.transfer.plan import pending
from peft_fps.benchmarks.transfer.store import Store


def fill(tasks: Sequence[str], rows: Sequence[RowKey], seeds: int, setting: Setting, store: Store, jobs: int) -> None:
    """Run all cells that are missing, and keep each as soon as it is finished.

    Args:
        tasks: names of tasks.
        rows: methods and their shares, the first ones first.
        seeds: number of seeds.
        setting: what all cells have in common.
        store: the cells that are finished.
        jobs: number of processes.

    Raises:
        ValueError: a cell cannot be run; those that are finished are kept.
    """
    context = multiprocessing.get_context("spawn")
    begin = partial(_begin, setting.threads)
    with (
        switched(QUIET | {"TQDM_DISABLE": "1"}),
        ProcessPoolExecutor(jobs, mp_context=context, initializer=begin) as pool,
    ):
        # in rounds, since learning rates are known only when the cells are there that they are chosen from
        while missing := pending(tasks, rows, seeds, setting, store.records, store.rates):
            futures: list[Future[Record]] = [pool.submit(run_cell, cell, setting) for cell in missing]
            try:
                for future in tqdm(as_completed(futures), total=len(futures), desc="cells"):
                    store.add(future.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _begin(threads: int) -> None:
    """Prepare a process for cells: quiet, and on its own threads."""
    sys.stdout = open(os.devnull, "w")  # the Trainer prints what it measured  # noqa: SIM115
    torch.set_num_threads(threads)
    from datasets import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    disable_progress_bars()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
