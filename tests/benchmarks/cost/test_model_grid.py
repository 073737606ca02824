"""The plan of the grid, with steps and a clock that are made up; one case is real."""

import pytest
from torch import nn

from peft_fps.benchmarks.cost import model_grid as grid
from peft_fps.benchmarks.cost.cost_tables import Result, markdown, tables
from peft_fps.benchmarks.cost.device_timer import Reading
from peft_fps.benchmarks.cost.model_grid import CASES, FEWEST, MOST, WARM_UP, Case, measure_grid, rounds_within
from peft_fps.benchmarks.cost.workload import Workload


@pytest.mark.parametrize(("once", "left", "rounds"), [(1, 7.9, 7), (1, 0.5, FEWEST), (1, -3, FEWEST), (0, 9, MOST)])
def test_rounds_fit_the_time_within_bounds(once, left, rounds):
    assert rounds_within(once, left) == rounds


class Made:
    """Steps of so many seconds and bytes by method, on a clock of its own; LoRA cannot be compiled."""

    def __init__(self, monkeypatch, seconds):
        self.now, self.seconds, self.steps = 0.0, seconds, []
        monkeypatch.setattr(grid, "build_model", lambda workload: nn.Linear(2, 3))
        monkeypatch.setattr(grid, "Training", self.training)

    def training(self, name, base, workload, compiled=False):
        if compiled and name == "lora":
            raise RuntimeError("cannot be compiled\nfor many reasons")
        made = self

        class Training:
            def step(self):
                made.now += made.seconds[name]
                made.steps.append(name + ", compiled" * compiled)

        return Training()

    def read(self, task):
        start = self.now
        task()
        return Reading(self.now - start, int(100 * (self.now - start)))

    def measure(self, *cases):
        return measure_grid(Workload(), cases, self.read, lambda: self.now)


def test_methods_take_turns_and_warm_up_rounds_do_not_count(monkeypatch):
    seconds = {"full": 4.0, "floor": 1.0, "lora": 2.0, "supertuning": 4.0, "fps": 1.5, "fps-pytorch": 1.75}
    made = Made(monkeypatch, seconds)
    row = made.measure(Case("tiny", "bf16", 4))
    (case,) = row.raw["cases"].values()
    assert made.steps == list(seconds) * (1 + WARM_UP + MOST)  # once to make the optimizer's states
    assert {name: (m["median"], len(m["all"]), m["peak"]) for name, m in case["methods"].items()} == {
        grid.METHODS[name].label: (taken, MOST, int(100 * taken)) for name, taken in seconds.items()
    }
    assert case["methods"]["FPS as installed"]["alone"] == 4 * (2 * 3 + 3) + 150
    assert {figure.what.partition(": ")[2]: figure.value for figure in row.figures} == {
        "FPS ÷ full fine-tuning, time": 0.375,
        "FPS ÷ full fine-tuning, peak": 0.375,
        "FPS ÷ LoRA r=16, time": 0.75,
        "FPS ÷ LoRA r=16, peak": 0.75,
    }


def test_what_is_compiled_runs_beside_what_is_not_and_failures_are_named(monkeypatch):
    made = Made(monkeypatch, dict.fromkeys(grid.METHODS, 1.0))
    row = made.measure(Case("tiny", "fp32", 4, compiled=True))
    assert made.steps[-5:] == ["full", "full, compiled", "lora", "fps", "fps, compiled"]
    assert row.skipped == {"tiny, fp32, batch 4, compiled: LoRA r=16, compiled": "RuntimeError: cannot be compiled"}


def test_cases_share_the_time_and_those_without_any_are_named(monkeypatch):
    made = Made(monkeypatch, dict.fromkeys(grid.METHODS, 10.0))
    cases = [Case("tiny", "fp32", size) for size in range(1, 5)]
    row = made.measure(*cases)
    rounds = [len(case["methods"]["FPS as installed"]["all"]) for case in row.raw["cases"].values()]
    assert rounds == [FEWEST, FEWEST]  # of a minute each; with warming up, six minutes for a case
    assert row.skipped == {case.name: "the 8 minutes were over" for case in cases[2:]}


def test_the_cases_are_those_that_the_help_promises():
    found = {(case.model, case.precision, case.batch_size) for case in CASES}
    loads = {(precision, size) for precision in ("fp32", "bf16") for size in (8, 32, 128)}
    vits = {(model, *load) for model in ("vit-b16", "vit-l16") for load in loads if load[1] > 8}
    assert found == vits | {("decoder-1b", *load) for load in loads if load[1] == 8}
    assert {case.model for case in CASES if case.compiled} == {"vit-b16", "vit-l16", "decoder-1b"}


def test_a_real_case_fills_the_table(workload, monkeypatch):
    monkeypatch.setattr(grid, "COMPARED", ("lora", "fps"))
    monkeypatch.setattr(grid, "MOST", 3)
    row = measure_grid(workload, [Case(workload.model, "bf16", 2)])
    result = Result(workload, {"processor": "Abacus", "torch": "1.0"}, "2026-01-02", 1, (row,))
    assert result.heading == "several models, Abacus, 1 threads, PyTorch 1.0, 2026-01-02"
    table = tables(result)[0]
    assert [line[1:4] for line in table.lines] == [("bf16", "2", "LoRA r=16"), ("bf16", "2", "FPS as installed")]
    assert all(float(line[4]) > 0 for line in table.lines)
    assert table.lines[0][6] == "1.00"
    assert table.title in markdown(result)
