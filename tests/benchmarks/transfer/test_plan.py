import re
import zlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_fps.benchmarks.transfer.arms import ARMS
from peft_fps.benchmarks.transfer.cells import Cell, Record, RowKey, Setting
from peft_fps.benchmarks.transfer.plan import chosen_rate, pending, trials


TASKS = ["a", "b", "c", "d"]
SETTING = Setting("vit", "tasks", tuned_on=("b", "d"), tuned_share=0.05)
RATES = (0.003, 0.01, 0.03)
LADDER = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)


def finished(cell: Cell, validation: float = 0.5, test: float = 0.5) -> Record:
    return Record(cell, "natural", validation, test, 1, 1, 10, {}, {}, None)


def accuracy_of(cell: Cell, salt: int = 0) -> float:
    """An arbitrary accuracy that a cell alone decides, of few values, so that ties are common."""
    return zlib.crc32(f"{cell} {salt}".encode()) % 4 / 4


def first_trials(method: str, setting: Setting) -> list[Cell]:
    tuned = ARMS[method].tuned_as or method
    if tuned == "linear":
        return []
    share = None if tuned in ("full", "bitfit") else setting.tuned_share
    rates = (0.0001, 0.0003, 0.001) if tuned == "full" else RATES
    return [Cell(task, tuned, share, 0, rate) for rate in rates for task in setting.tuned_on]


def naive_tuning(method: str, setting: Setting, validation: dict[Cell, float]) -> tuple[list[Cell], float | None]:
    """All trials that had to be run, and the rate that came of them."""
    cells = first_trials(method, setting)
    while cells:
        totals: dict[float, float] = {}
        for cell in cells:
            totals[cell.learning_rate] = totals.get(cell.learning_rate, 0) + validation[cell]
        best = min(rate for rate, total in totals.items() if total == max(totals.values()))
        below = [rate for rate in LADDER if rate < min(totals)]
        above = [rate for rate in LADDER if rate > max(totals)]
        if best == max(totals) and above:
            more = above[0]
        elif best == min(totals) and below:
            more = below[-1]
        else:
            return cells, best
        cells = cells + [replace(cell, learning_rate=more) for cell in cells if cell.learning_rate == best]
    return [], None


@pytest.mark.parametrize("method", ARMS)
def test_trials_are_the_cells_of_the_method_that_tunes(method):
    assert trials(method, SETTING, {}) == first_trials(method, SETTING)
    assert len(trials(method, SETTING, {})) == (0 if method == "linear" else 6)


@pytest.mark.parametrize(("method", "tuner"), [("fps-l2", "fps"), ("gps-task", "gps"), ("try-class-spread", "fps")])
def test_variants_take_the_rate_of_their_method(method, tuner):
    assert trials(method, SETTING, {}) == trials(tuner, SETTING, {})
    records = [finished(cell, 0.9 if cell.learning_rate == 0.01 else 0.1) for cell in trials(tuner, SETTING, {})]
    assert chosen_rate(method, SETTING, records) == chosen_rate(tuner, SETTING, records) == 0.01
    assert pending(["a"], [(method, 0.01)], 1, SETTING, records) == [Cell("a", method, 0.01, 0, 0.01)]


def test_trials_come_first_then_cells_at_the_best_rate():
    tried = trials("fps", SETTING, {})
    assert pending(TASKS, [("fps", 0.05)], 2, SETTING, []) == sorted(tried, key=lambda cell: cell.task)
    records = [finished(cell, 0.6 if cell.learning_rate == 0.01 else 0.5) for cell in tried[1:]]
    assert pending(TASKS, [("fps", 0.05)], 2, SETTING, records) == tried[:1]
    records.append(finished(tried[0]))
    first = [Cell(task, "fps", 0.05, 0, 0.01) for task in "ac"]  # b and d were trials
    second = [Cell(task, "fps", 0.05, 1, 0.01) for task in "bdac"]
    assert pending(TASKS, [("fps", 0.05)], 2, SETTING, records) == first + second


def test_seeds_come_before_rows_and_rows_before_tasks():
    every = [cell for method in ("fps", "lora") for cell in trials(method, SETTING, {})]
    records = [finished(cell, 0.9 if cell.learning_rate == 0.01 else 0.1) for cell in every]
    rows: list[RowKey] = [("lora", 0.1), ("linear", None), ("fps", 0.1)]
    found = pending(["a", "b"], rows, 2, SETTING, records)
    assert [(cell.seed, cell.method, cell.task) for cell in found] == [
        (seed, method, task) for seed in (0, 1) for method in ("lora", "linear", "fps") for task in ("b", "a")
    ]


def test_other_shares_keep_the_rate_that_was_chosen_at_one():
    records = [finished(cell, 0.9 if cell.learning_rate == 0.01 else 0.1) for cell in trials("fps", SETTING, {})]
    found = pending(["a"], [("fps", 0.5), ("fps", 0.01)], 1, SETTING, records)
    assert found == [Cell("a", "fps", 0.5, 0, 0.01), Cell("a", "fps", 0.01, 0, 0.01)]


def test_a_rate_is_chosen_by_the_mean_over_tasks():
    validation = {("b", 0.003): 0.9, ("d", 0.003): 0.1, ("b", 0.01): 0.6, ("d", 0.01): 0.6, ("b", 0.03): 0.8}
    records = [
        finished(cell, validation.get((cell.task, cell.learning_rate), 0.2)) for cell in trials("fps", SETTING, {})
    ]
    assert chosen_rate("fps", SETTING, records) == 0.01


@pytest.mark.parametrize("best_on_test", RATES)
def test_test_accuracies_choose_nothing(best_on_test):
    records = [
        finished(cell, float(cell.learning_rate == 0.01) / 2, float(cell.learning_rate == best_on_test))
        for cell in trials("fps", SETTING, {})
    ]
    assert chosen_rate("fps", SETTING, records) == 0.01
    assert {cell.learning_rate for cell in pending(TASKS, [("fps", 0.05)], 1, SETTING, records)} == {0.01}


@pytest.mark.parametrize(("order", "tried"), [(1, RATES + LADDER[8:]), (-1, LADDER[:5] + RATES)])
def test_the_next_rate_is_tried_as_long_as_the_best_is_at_an_end(order, tried):
    records: list[Record] = []
    while new := [
        c
        for c in trials("fps", SETTING, {r.cell: r.validation for r in records})
        if c not in {r.cell for r in records}
    ]:
        records += [finished(cell, order * cell.learning_rate) for cell in new]
    assert sorted({record.cell.learning_rate for record in records}) == list(tried)
    assert chosen_rate("fps", SETTING, records) == (0.3 if order == 1 else 1e-5)


def test_a_rate_beyond_the_best_ends_the_search():
    accuracies = {0.003: 0.1, 0.01: 0.2, 0.03: 0.5, 0.1: 0.4}
    records = [finished(cell, accuracies[cell.learning_rate]) for cell in trials("fps", SETTING, {})]
    more = pending(TASKS, [("fps", 0.05)], 1, SETTING, records)
    assert more == [Cell(task, "fps", 0.05, 0, 0.1) for task in "bd"]
    with pytest.raises(ValueError, match="2 of 8 cells are missing"):
        chosen_rate("fps", SETTING, records)
    records += [finished(cell, accuracies[cell.learning_rate]) for cell in more]
    assert chosen_rate("fps", SETTING, records) == 0.03


def test_cells_besides_the_trials_choose_nothing():
    records = [finished(cell, float(cell.learning_rate == 0.01)) for cell in trials("fps", SETTING, {})]
    others = [
        *(Cell("a", "fps", 0.05, 0, rate) for rate in RATES),
        *(Cell("b", "fps", 0.05, 1, rate) for rate in RATES),
        *(Cell("b", "fps", 0.5, 0, rate) for rate in RATES),
        *(Cell("b", "gps", 0.05, 0, rate) for rate in RATES),
    ]
    records += [finished(cell, 1.0 if cell.learning_rate == 0.03 else 0.0) for cell in others]
    assert chosen_rate("fps", SETTING, records) == 0.01


@pytest.mark.parametrize(
    ("validation", "rate"),
    [((0.1, 0.5, 0.5, 0.5), 0.003), ((0.1, 0.2, 0.5, 0.5), 0.01), ((0.1, 0.5, 0.2, 0.5), 0.003)],
)
def test_the_smaller_rate_of_equals(validation, rate):
    of_rate = dict(zip((0.001, *RATES), validation, strict=True))
    first = trials("fps", SETTING, {})
    further = [replace(cell, learning_rate=0.001) for cell in first[:2]]
    records = [finished(cell, of_rate[cell.learning_rate]) for cell in first + further]
    assert chosen_rate("fps", SETTING, records) == rate
    assert chosen_rate("fps", SETTING, records[::-1]) == rate


def test_a_rate_cannot_be_chosen_before_all_its_cells_are_there():
    records = [finished(cell) for cell in trials("fps", SETTING, {})[:4]]
    message = "The learning rate of 'fps-l2' cannot be chosen: 2 of 6 cells are missing"
    with pytest.raises(ValueError, match=re.escape(message)):
        chosen_rate("fps-l2", SETTING, records)


def test_the_linear_head_has_no_rate():
    assert chosen_rate("linear", SETTING, []) is None
    assert pending(["a"], [("linear", None)], 2, SETTING, []) == [Cell("a", "linear", None, s, None) for s in (0, 1)]


METHODS = ("linear", "full", "bitfit", "lora", "fps", "fps-l2", "try-image-spread", "gps-task", "random")
ROWS = st.lists(
    st.sampled_from(METHODS).flatmap(
        lambda method: st.tuples(st.just(method), st.sampled_from([0.05, 0.1]) if ARMS[method].budgeted else st.none())
    ),
    min_size=1,
    max_size=5,
    unique=True,
)
TUNED = st.lists(st.sampled_from(TASKS), min_size=1, max_size=3, unique=True)


class Accuracies(dict):
    """Of every cell that there could be."""

    def __init__(self, salt):
        self.salt = salt

    def __missing__(self, cell):
        return accuracy_of(cell, self.salt)


@given(
    tasks=st.lists(st.sampled_from(TASKS), min_size=1, unique=True),
    rows=ROWS,
    seeds=st.integers(1, 3),
    tuned_on=TUNED,
    stopped=st.integers(0, 20),
    salt=st.integers(0, 5),
)
def test_every_cell_is_visited_once_and_none_is_missing(tasks, rows, seeds, tuned_on, stopped, salt):
    setting = replace(SETTING, tuned_on=tuple(tuned_on))
    records: list[Record] = []
    rounds = 0
    while missing := pending(tasks, rows, seeds, setting, records):
        rounds += 1
        assert rounds < 100
        # the run is stopped at some point of every round, as a kill would
        some = missing if rounds > 3 else missing[: stopped + 1]
        records += [finished(cell, accuracy_of(cell, salt), accuracy_of(cell, salt + 1)) for cell in some]
    visited = [record.cell for record in records]
    assert len(visited) == len(set(visited))

    validation = Accuracies(salt)
    expected = {cell for method, _ in rows for cell in naive_tuning(method, setting, validation)[0]}
    for method, share in rows:
        rate = naive_tuning(method, setting, validation)[1]
        expected |= {Cell(task, method, share, seed, rate) for task in tasks for seed in range(seeds)}
    assert set(visited) == expected
