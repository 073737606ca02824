import zlib
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_fps.benchmarks.transfer.arms import ARMS
from peft_fps.benchmarks.transfer.cells import Cell, Record, RowKey, Setting
from peft_fps.benchmarks.transfer.plan import chosen_rate, chosen_rates, pending, trials


TASKS = ["a", "b", "c", "d"]
SETTING = Setting("vit", "tasks", tuned_share=0.05)
RATES = (0.003, 0.01, 0.03)
BEST = {"a": 0.003, "b": 0.01, "c": 0.03, "d": 0.01}


def finished(cell: Cell, validation: float = 0.5, test: float = 0.5) -> Record:
    return Record(cell, "natural", validation, test, 1, 1, 10, {}, {}, None)


def validations(records: Iterable[Record]) -> dict[Cell, float]:
    return {record.cell: record.validation for record in records}


def tuned(method: str, tasks: Iterable[str]) -> list[Record]:
    """A method's trials, of which those at the rates of `BEST` are the best ones."""
    cells = [Cell(task, method, 0.05, 0, rate) for task in tasks for rate in RATES]
    return [finished(cell, 0.9 if cell.learning_rate == BEST[cell.task] else 0.1) for cell in cells]


def accuracy_of(cell: Cell, salt: int = 0) -> float:
    """An arbitrary accuracy that a cell alone decides, of few values, so that ties are common."""
    return zlib.crc32(f"{cell} {salt}".encode()) % 4 / 4


def naive_trials(method: str, task: str, share: float = 0.05) -> list[Cell]:
    method = ARMS[method].tuned_as or method
    if method == "linear":
        return []
    others = {"full": (0.0001, 0.0003, 0.001), "fish-mask": (0.001, 0.003, 0.01), "fps-model": (0.001, 0.003, 0.01)}
    others["try-low-rates"] = others["fps-default-one-rate"] = (0.01,)
    rates = others.get(method, RATES)
    return [Cell(task, method, None if method in ("full", "bitfit") else share, 0, rate) for rate in rates]


def naive_rate(method: str, task: str, validation: Callable[[Cell], float]) -> float | None:
    best, rate = -1.0, None
    for cell in naive_trials(method, task):  # from the smallest rate to the largest
        if validation(cell) > best:
            best, rate = validation(cell), cell.learning_rate
    return rate


@pytest.mark.parametrize("share", [0.05, 0.5])
@pytest.mark.parametrize("method", ARMS)
def test_trials_are_the_cells_of_the_method_that_tunes_on_that_task(method, share):
    found = trials(method, "b", Setting("vit", "tasks", tuned_share=share))
    assert found == naive_trials(method, "b", share)
    assert len(found) == {"linear": 0, "try-low-rates": 1, "fps-default-one-rate": 1}.get(method, 3)


@pytest.mark.parametrize(("method", "tuner"), [("fps-l2", "fps"), ("gps-task", "gps"), ("try-class-spread", "fps")])
def test_variants_take_the_rates_of_their_method(method, tuner):
    records = tuned(tuner, "ac")
    for task in "ac":
        assert trials(method, task, SETTING) == trials(tuner, task, SETTING)
        for name in (method, tuner):
            assert chosen_rate(name, task, SETTING, validations(records)) == BEST[task]
    assert pending(["a", "c"], [(method, 0.01)], 1, SETTING, records) == [
        Cell("a", method, 0.01, 0, 0.003),
        Cell("c", method, 0.01, 0, 0.03),
    ]
    assert pending(["a"], [(method, 0.01)], 1, SETTING, []) == [Cell("a", tuner, 0.05, 0, rate) for rate in RATES]


def test_rates_chosen_before_need_no_trials():
    rates = chosen_rates(tuned("fps", "ac"), SETTING)
    assert rates == {("fps", task): BEST[task] for task in "ac"} | {("linear", task): None for task in "ac"}
    rows: list[RowKey] = [("fps-l2", 0.05), ("lora", 0.05), ("linear", None)]
    assert pending(["a", "c"], rows, 1, SETTING, [], rates) == [
        *(Cell(task, "fps-l2", 0.05, 0, BEST[task]) for task in "ac"),
        *(cell for task in "ac" for cell in trials("lora", task, SETTING)),
        *(Cell(task, "linear", None, 0, None) for task in "ac"),
    ]


def test_trials_come_first_then_cells_at_the_best_rate():
    rows: list[RowKey] = [("fps", 0.05), ("fps", 0.1)]
    records = tuned("fps", "b")
    assert pending(["b"], rows, 2, SETTING, []) == [record.cell for record in records]
    assert pending(["b"], rows, 2, SETTING, records[1:]) == [records[0].cell]
    assert pending(["b"], rows, 2, SETTING, records) == [
        Cell("b", "fps", 0.1, 0, 0.01),  # with the other share, seed 0 was a trial
        Cell("b", "fps", 0.05, 1, 0.01),
        Cell("b", "fps", 0.1, 1, 0.01),
    ]


def test_every_task_has_its_own_rate():
    records = tuned("fps", TASKS)
    found = pending(TASKS, [("fps", 0.1)], 1, SETTING, records)
    assert found == [Cell(task, "fps", 0.1, 0, BEST[task]) for task in TASKS]


@pytest.mark.parametrize("lost", range(3))
def test_a_task_goes_on_while_trials_of_another_are_missing(lost):
    there, missing = tuned("fps", "a"), tuned("fps", "b")
    there += [record for place, record in enumerate(missing) if place != lost]
    assert pending(["b", "a"], [("fps", 0.1)], 2, SETTING, there) == [
        missing[lost].cell,
        Cell("a", "fps", 0.1, 0, BEST["a"]),
        Cell("a", "fps", 0.1, 1, BEST["a"]),
    ]


def test_seeds_come_before_rows_and_rows_before_tasks():
    records = [record for method in ("fps", "lora") for record in tuned(method, "ab")]
    rows: list[RowKey] = [("lora", 0.1), ("linear", None), ("fps", 0.1)]
    found = pending(["b", "a"], rows, 2, SETTING, records)
    assert [(cell.seed, cell.method, cell.task) for cell in found] == [
        (seed, method, task) for seed in (0, 1) for method in ("lora", "linear", "fps") for task in ("b", "a")
    ]


def test_trials_stand_in_the_row_that_needs_them_first():
    rows: list[RowKey] = [("fps-l2", 0.1), ("linear", None), ("fps", 0.1)]
    fps, linear = naive_trials("fps", "a"), Cell("a", "linear", None, 0, None)
    assert pending(["a"], rows, 1, SETTING, []) == [*fps, linear]
    assert pending(["a"], rows[1:], 1, SETTING, []) == [linear, *fps]


def test_other_shares_and_seeds_keep_the_rate_that_was_chosen_at_one():
    records = tuned("fps", "a")
    others = [Cell("a", "fps", share, seed, 0.03) for share, seed in ((0.5, 0), (0.01, 0), (0.05, 1))]
    records += [finished(cell, 1.0) for cell in others]  # better, but too late
    found = pending(["a"], [("fps", 0.5), ("fps", 0.01), ("fps", 0.05)], 2, SETTING, records)
    rows = [(0, 0.5), (0, 0.01), (1, 0.5), (1, 0.01), (1, 0.05)]
    assert found == [Cell("a", "fps", share, seed, 0.003) for seed, share in rows]


@pytest.mark.parametrize("best_on_test", RATES)
def test_test_accuracies_choose_nothing(best_on_test):
    records = [
        finished(cell, float(cell.learning_rate == 0.01) / 2, float(cell.learning_rate == best_on_test))
        for cell in naive_trials("fps", "a")
    ]
    found = pending(["a"], [("fps", 0.05), ("fps-l2", 0.1)], 2, SETTING, records)
    assert {cell.learning_rate for cell in found} == {0.01}


def test_cells_besides_the_trials_choose_nothing():
    others = [
        *(Cell("b", "fps", 0.05, 0, rate) for rate in RATES),
        *(Cell("a", "fps", 0.05, 1, rate) for rate in RATES),
        *(Cell("a", "fps", 0.5, 0, rate) for rate in RATES),
        *(Cell("a", "gps", 0.05, 0, rate) for rate in RATES),
        *(Cell("a", "fps-l2", 0.05, 0, rate) for rate in RATES),
        Cell("a", "fps", 0.05, 0, 0.1),
    ]
    records = [finished(cell, 0.0 if cell.learning_rate == BEST["a"] else 1.0) for cell in others]
    assert chosen_rate("fps", "a", SETTING, validations(tuned("fps", "a") + records)) == BEST["a"]


@pytest.mark.parametrize(
    ("validation", "rate"),
    [
        ((0.5, 0.5, 0.5), 0.003),
        ((0.2, 0.5, 0.5), 0.01),
        ((0.5, 0.2, 0.5), 0.003),
        ((0.5, 0.5, 0.2), 0.003),
        ((0.0, 0.0, 0.0), 0.003),
        ((0.1, 0.2, 0.3), 0.03),
    ],
)
def test_the_smaller_rate_of_equals(validation, rate):
    records = [finished(cell, found) for cell, found in zip(naive_trials("fps", "a"), validation, strict=True)]
    assert chosen_rate("fps", "a", SETTING, validations(records)) == rate
    assert chosen_rate("fps", "a", SETTING, validations(records[::-1])) == rate


def test_the_linear_head_has_no_rate():
    assert chosen_rate("linear", "a", SETTING, {}) is None
    assert pending(["a"], [("linear", None)], 2, SETTING, []) == [Cell("a", "linear", None, s, None) for s in (0, 1)]


METHODS = ("linear", "full", "bitfit", "lora", "fps", "fps-l2", "try-token-spread", "gps-task", "random")
ROWS = st.lists(
    st.sampled_from(METHODS).flatmap(
        lambda method: st.tuples(st.just(method), st.sampled_from([0.05, 0.1]) if ARMS[method].budgeted else st.none())
    ),
    min_size=1,
    max_size=5,
    unique=True,
)


@given(
    tasks=st.lists(st.sampled_from(TASKS), min_size=1, unique=True),
    rows=ROWS,
    seeds=st.integers(1, 3),
    stopped=st.integers(0, 20),
    salt=st.integers(0, 5),
)
def test_every_cell_is_visited_once_and_none_is_missing(tasks, rows, seeds, stopped, salt):
    def place(cell: Cell) -> tuple[int, int, int]:
        row = next(i for i, r in enumerate(rows) if cell.row == r or cell in naive_trials(r[0], cell.task))
        return cell.seed, row, tasks.index(cell.task)

    records: list[Record] = []
    rounds = 0
    while missing := pending(tasks, rows, seeds, SETTING, records):
        rounds += 1
        assert rounds < 10
        assert [place(cell) for cell in missing] == sorted(place(cell) for cell in missing)
        alone = [cell for task in tasks for cell in pending([task], rows, seeds, SETTING, records)]
        assert sorted(missing, key=str) == sorted(alone, key=str)
        # the run is stopped at some point of every round, as a kill would
        some = missing if rounds > 3 else missing[: stopped + 1]
        records += [finished(cell, accuracy_of(cell, salt), accuracy_of(cell, salt + 1)) for cell in some]
    visited = [record.cell for record in records]
    assert len(visited) == len(set(visited))

    expected = set()
    for task in tasks:
        for method, share in rows:
            rate = naive_rate(method, task, lambda cell: accuracy_of(cell, salt))
            expected |= {
                *naive_trials(method, task),
                *(Cell(task, method, share, seed, rate) for seed in range(seeds)),
            }
    assert set(visited) == expected
