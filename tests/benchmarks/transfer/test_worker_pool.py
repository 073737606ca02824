"""Which cells are run and kept; the cells are made up, the processes are in test_command."""

import io
import os
import sys
from concurrent.futures import Future

import pytest
import torch
from datasets import are_progress_bars_disabled, enable_progress_bars
from transformers.utils import logging as transformers_logging

from peft_fps.benchmarks.transfer import worker_pool
from peft_fps.benchmarks.transfer.cells import Cell, Record
from peft_fps.benchmarks.transfer.plan import pending
from peft_fps.benchmarks.transfer.store import Store
from tests.benchmarks.transfer.records import SETTING


ROWS = [("linear", None), ("fps", 0.05), ("fps-l2", 0.1)]
BEST = {"a": 0.01, "b": 0.03}
TASKS = list(BEST)


def made_up(cell: Cell, setting) -> Record:
    assert setting is SETTING
    validation = 0.9 if cell.learning_rate == BEST[cell.task] else 0.1
    return Record(cell, "natural", validation, 0.5, 1, 1, 10, {"select": 0.0}, {"select": 0}, None)


class InlinePool:
    """Runs what is submitted at once, in this process."""

    started: list[int] = []

    def __init__(self, jobs, mp_context, initializer):
        assert mp_context.get_start_method() == "spawn"
        self.started.append(jobs)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, function, *arguments):
        future = Future()
        try:
            future.set_result(function(*arguments))
        except ValueError as error:
            future.set_exception(error)
        return future

    def shutdown(self, wait, cancel_futures):
        assert cancel_futures


@pytest.fixture(autouse=True)
def inline(monkeypatch):
    monkeypatch.setattr(worker_pool, "ProcessPoolExecutor", InlinePool)
    monkeypatch.setattr(worker_pool, "run_cell", made_up)


def test_trials_and_then_all_cells_at_the_rate_that_they_choose(tmp_path):
    store = Store(tmp_path / "cells.jsonl", SETTING, {})
    worker_pool.fill(TASKS, ROWS, 2, SETTING, store, jobs=3)
    trials = {Cell(task, "fps", 0.05, 0, rate) for task in TASKS for rate in (0.003, 0.01, 0.03)}
    cells = {Cell(task, *row, seed, BEST[task]) for task in TASKS for row in ROWS[1:] for seed in (0, 1)}
    heads = {Cell(task, "linear", None, seed, None) for task in TASKS for seed in (0, 1)}
    found = [record.cell for record in store.records]
    assert set(found) == trials | cells | heads
    assert len(found) == len(set(found))
    assert InlinePool.started[-1] == 3
    again = Store(tmp_path / "cells.jsonl", SETTING, {})
    assert again.records == store.records


def test_nothing_is_run_twice(tmp_path, monkeypatch):
    store = Store(tmp_path / "cells.jsonl", SETTING, {})
    worker_pool.fill(TASKS, ROWS[:2], 1, SETTING, store, jobs=1)
    ran = []
    monkeypatch.setattr(worker_pool, "run_cell", lambda cell, setting: (ran.append(cell), made_up(cell, setting))[1])
    worker_pool.fill(TASKS, ROWS[:2], 1, SETTING, store, jobs=1)
    assert ran == []
    worker_pool.fill(TASKS, ROWS, 1, SETTING, store, jobs=1)
    assert ran == [Cell(task, "fps-l2", 0.1, 0, BEST[task]) for task in TASKS]


def test_cells_that_are_finished_before_a_mistake_are_kept(tmp_path, monkeypatch):
    def fail(cell, setting):
        if (cell.method, cell.task) == ("fps-l2", "b"):
            raise ValueError("no such budget")
        return made_up(cell, setting)

    monkeypatch.setattr(worker_pool, "run_cell", fail)
    # in the order of submission, as one process would finish them
    monkeypatch.setattr(worker_pool, "as_completed", iter)
    store = Store(tmp_path / "cells.jsonl", SETTING, {})
    with pytest.raises(ValueError, match="no such budget"):
        worker_pool.fill(TASKS, ROWS, 1, SETTING, store, jobs=1)
    kept = Store(tmp_path / "cells.jsonl", SETTING, {}).records
    assert kept == store.records
    assert pending(TASKS, ROWS, 1, SETTING, kept) == [Cell("b", "fps-l2", 0.1, 0, BEST["b"])]
    monkeypatch.setattr(worker_pool, "run_cell", made_up)
    worker_pool.fill(TASKS, ROWS, 1, SETTING, store, jobs=1)
    assert pending(TASKS, ROWS, 1, SETTING, store.records) == []


def test_the_environment_is_as_before(tmp_path):
    before = dict(os.environ)
    worker_pool.fill(TASKS, ROWS, 1, SETTING, Store(tmp_path / "cells.jsonl", SETTING, {}), jobs=1)
    assert dict(os.environ) == before


def test_a_process_is_quiet_and_keeps_to_its_threads(monkeypatch):
    threads, verbosity = torch.get_num_threads(), transformers_logging.get_verbosity()
    monkeypatch.setattr(sys, "stdout", written := io.StringIO())
    try:
        worker_pool._begin(threads + 1)
        print("the Trainer's measurements")  # noqa: T201
        sys.stdout.close()
        assert torch.get_num_threads() == threads + 1
        assert transformers_logging.get_verbosity() == transformers_logging.ERROR
        assert are_progress_bars_disabled()
    finally:
        torch.set_num_threads(threads)
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()
        enable_progress_bars()
    assert written.getvalue() == ""
