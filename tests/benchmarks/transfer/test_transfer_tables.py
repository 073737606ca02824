"""Tables of records made by hand, with numbers worked out by hand."""

import pytest

from peft_fps.benchmarks.transfer.arms import ARMS
from peft_fps.benchmarks.transfer.estimates import Estimate
from peft_fps.benchmarks.transfer.transfer_tables import (
    Results,
    accuracy_table,
    budget_table,
    cost_table,
    difference_table,
    rate_table,
    show,
    tables,
)
from tests.benchmarks.transfer.records import BEST, OTHER, SETTING, chosen, record


def everything():
    """Tasks b and c are natural, a is structured; fps has two seeds, gps has no task c, linear one seed.

    The best rate of fps on task b is another one than on a and c.
    """
    return [
        *chosen("fps", test=0.5),
        *chosen("fps", "b", test=0.7, best=OTHER),
        *chosen("fps", "c", test=0.9, trained=60),
        record("fps", "a", 1, test=0.6),
        record("fps", "b", 1, test=0.8, rate=OTHER),
        record("fps", "c", 1, test=0.8, trained=60),
        record("fps", "a", 2, test=0.0, rate=OTHER),  # the rates that are chosen on other tasks
        record("fps", "b", 2, test=0.0),
        *chosen("gps", test=0.4),
        *chosen("gps", "b", test=0.6),
        record("gps", "c", test=1.0),  # its rate has not been chosen on this task yet
        *(
            record("linear", task, test=test, share=None, rate=None, trained=0)
            for task, test in zip("abc", (0.2, 0.3, 0.5), strict=True)
        ),
        *chosen("random", test=1.0)[:2],  # nor has this one's anywhere
    ]


@pytest.fixture
def results():
    return Results(everything(), SETTING)


def test_groups_and_tasks_stand_in_vtabs_order(results):
    assert results.groups == {"natural": ["b", "c"], "structured": ["a"]}
    assert results.tasks == ["b", "c", "a"]
    assert results.shares == [0.05]


def test_accuracies_are_of_the_chosen_rate_alone(results):
    assert set(results.rows) == {("fps", 0.05), ("gps", 0.05), ("linear", None)}
    for method in ("fps", "fps-l2"):
        assert {task: results.rates[method, task] for task in "abc"} == {"a": 0.01, "b": 0.03, "c": 0.01}
    assert {task: results.rates.get(("gps", task)) for task in "abc"} == {"a": 0.01, "b": 0.01, "c": None}
    assert {task: results.rates["linear", task] for task in "abc"} == dict.fromkeys("abc")
    assert not any(method == "random" for method, _ in results.rates)
    assert results.accuracies(("fps", 0.05)) == {"a": {0: 0.5, 1: 0.6}, "b": {0: 0.7, 1: 0.8}, "c": {0: 0.9, 1: 0.8}}
    by_validation = Results(everything(), SETTING, split="validation")
    assert by_validation.accuracies(("fps", 0.05)) == {
        "a": {0: 0.9, 1: 0.5},
        "b": {0: 0.9, 1: 0.5},
        "c": {0: 0.9, 1: 0.5},
    }
    assert tables(by_validation, "gps")[0].title == "Validation accuracy, %, at most 5.00% of the backbone trained"
    assert results.accuracies(("random", 0.05)) == {}


def test_rows_of_a_share(results):
    records = [*everything(), record("fps", test=0.1, share=0.1), record("fps-l2", test=0.1, share=0.1)]
    found = Results(records, SETTING)
    assert found.shares == [0.1, 0.05]
    assert found.of_share(0.1) == [("linear", None), ("fps", 0.1), ("fps-l2", 0.1)]
    assert found.of_share(0.05) == [("linear", None), ("fps", 0.05), ("gps", 0.05)]
    assert found.of_share(None) == [("linear", None)]


@pytest.mark.parametrize(
    ("seeds", "complete"),
    [
        ({"a": [0], "b": [0, 1], "c": [0]}, {0}),
        ({"a": [0, 2], "b": [2, 1, 0], "c": [0, 2]}, {0, 2}),
        ({"a": [0], "b": [0]}, set()),
        ({"a": [0], "b": [1], "c": [0]}, set()),
    ],
)
def test_seeds_that_have_all_tasks(seeds, complete):
    records = [record("linear", task, seed, share=None, rate=None) for task, found in seeds.items() for seed in found]
    others = [record("bitfit", task, share=None) for task in "abc"]
    assert Results([*records, *others], SETTING).seeds(("linear", None)) == complete


def test_accuracies_with_means_and_standard_errors(results):
    table = accuracy_table(results, results.of_share(0.05), "Accuracy")
    assert table.title == "Accuracy"
    assert table.header == ("method", "trained, %", "seeds", "b", "c", "a", "natural", "structured", "mean")
    # fps: 50, 50, 60, 50, 50, 60 of 1000 trained in its six cells; per seed (0.5 + 0.7 + 0.9) / 3 = 0.7 and
    # (0.6 + 0.8 + 0.8) / 3 = 0.7333, whose standard error is half their difference
    linear, fps, gps = table.lines
    assert linear == ("linear head, frozen model", "0.00", "1", "30.0", "50.0", "20.0", "40.0", "20.0", "33.3")
    assert fps == (
        *("FPS", "5.33", "2"),
        *("75.0 ± 5.0", "85.0 ± 5.0", "55.0 ± 5.0", "80.0", "55.0", "71.7 ± 1.7"),
    )
    assert gps == ("GPS, contrastive", "5.00", "1", "60.0", "", "40.0", "", "40.0", "")


def test_no_mean_without_a_seed_that_has_all_tasks():
    records = [record("linear", task, seed, share=None, rate=None) for seed, task in enumerate("abc")]
    table = accuracy_table(Results(records, SETTING), [("linear", None)], "")
    assert table.lines[0][2:] == ("3", *["50.0"] * 5, "")


def pairs(method, differences):
    """Cells of a method on all three tasks, so much better than one half."""
    by_task = zip("abc", differences, strict=True)
    return [trial for task, more in by_task for trial in chosen(method, task, test=0.5 + more)]


def test_verdicts_on_differences():
    records = [
        *pairs("gps", [0, 0, 0]),
        *pairs("fps", [0.1, 0.12, 0.14]),  # 4.303 * 0.02 / sqrt(3) = 0.0497; p = 1 - t / sqrt(2 + t^2), t = 10.39
        *pairs("magnitude", [-0.1, -0.12, -0.14]),
        *pairs("random", [0.1, -0.1, 0.03]),  # 0.01 ± 4.303 * 0.1015 / sqrt(3) = 0.2521
        *chosen("lora", test=0.9),  # one task in common is no comparison
    ]
    results = Results(records, SETTING)
    rows = [row for row in results.of_share(0.05) if row[0] != "gps"]
    table = difference_table(results, rows, ("gps", 0.05))
    assert table.title == "Difference to GPS, contrastive, points of accuracy, at 5.00%"
    assert table.header == ("method", "mean", "95 % interval over tasks", "p (Holm)", "pairs", "verdict")
    assert table.lines == (
        ("random", "+1.00", "-24.2 … +26.2", "0.880", "3", "noise"),
        ("magnitude, as NeuroAda", "-12.00", "-17.0 … -7.0", "0.027", "3", "worse"),
        ("FPS", "+12.00", "+7.0 … +17.0", "0.027", "3", "better"),
    )


def test_costs_are_medians_over_cells_and_the_largest_file():
    def cell(seed, select, train, held, step, size, method="linear", share=None, rate=None):
        seconds, sizes = {"select": select, "train": train}, {"select": held, "train": step, "adapter": size}
        return record(method, "a", seed, share=share, rate=rate, seconds=seconds, bytes=sizes)

    records = [
        cell(0, 1.0, 10.0, 2**20, 2**21, 1024),
        cell(1, 3.0, 30.0, 3 * 2**20, 2**23, 2_048_000),
        cell(2, 2.04, 24.4, 2**21, 2**22, 512),
        *chosen("fps", seconds={"select": 9.0, "train": 8.0}),
        cell(0, 99.0, 99.0, 2**30, 2**30, 2**30, "fps", 0.1, BEST),  # another share than that of the rates
    ]
    table = cost_table(Results(records, SETTING))
    assert table.title.startswith("What the methods cost here, at 5.00%")
    assert table.header == (
        *("method", "selection, s", "its peak, MiB", "training, s", "a step's peak, MiB", "largest file, KiB"),
    )
    assert table.lines == (
        ("linear head, frozen model", "2.0", "2.0", "24", "4.0", "2,000"),
        ("FPS", "9.0", "1.0", "8", "2.0", "1"),  # the trials at other rates are no further cells
    )


def test_the_soft_score_stands_beside_the_costs_where_full_fine_tuning_was_run():
    def sizes(step):
        return {"select": 0, "train": step, "adapter": 0}

    fps = chosen("fps", test=0.8, bytes=sizes(50), operations=-0.25, trained=100)
    full = chosen("full", test=0.6, bytes=sizes(200), operations=0.0, trained=1000)
    table = cost_table(Results([*fps, *full], SETTING))
    assert table.header[-1] == "PSCP"
    expected = {"FPS": 80 / (1.1 * 0.75 * 1.25), "full fine-tuning": 60 / (2 * 1 * 2)}
    assert {line[0]: line[-1] for line in table.lines} == {name: f"{value:.1f}" for name, value in expected.items()}
    assert cost_table(Results(fps, SETTING)).header[-1] == "largest file, KiB"


def test_costs_are_of_the_cells_at_the_chosen_rate():
    slow = [
        record(
            "fps",
            rate=rate,
            validation=0.9 if rate == 0.01 else 0.1,
            seconds={"select": 1.0, "train": 1.0 if rate == 0.01 else 99.0},
        )
        for rate in ARMS["fps"].learning_rates
    ]
    assert [line[3] for line in cost_table(Results(slow, SETTING)).lines] == ["1"]


def test_rates_of_every_method_by_task():
    records = [
        *everything(),
        *chosen("full"),
        *chosen("full", "c", best=0.001),
        record("full", "b", share=None, rate=0.0003),  # the only trial there
        record("fps-l2", "b", share=0.1, rate=OTHER),  # has the rates of fps
        *chosen("magnitude", "b", best=0.003),
    ]
    table = rate_table(Results(records, SETTING))
    assert table.title == "Learning rates, chosen on validation images"
    assert table.header == ("method", "b", "c", "a")
    assert table.lines == (
        ("full fine-tuning", "", "0.001", "0.0003"),
        ("magnitude, as NeuroAda", "0.003", "", ""),
        ("FPS", "0.03", "0.01", "0.01"),
        ("GPS, contrastive", "0.01", "", "0.01"),
    )


def test_tables_of_every_share_of_the_rates_and_of_the_costs():
    rates = {"a": BEST, "b": OTHER, "c": BEST}
    more = [
        record(method, task, share=share, test=0.9, rate=rate)
        for task, rate in rates.items()
        for method, share in (("fps", 0.1), ("fps-layer", 0.1), ("fps", 0.2), ("fps-l2", 0.05), ("fps-layer", 0.05))
    ]
    found = tables(Results([*everything(), *more], SETTING), "fps")
    assert [table.title for table in found] == [
        "Test accuracy, %, at most 20.00% of the backbone trained",
        "Difference to FPS, points of accuracy, at 20.00%",
        "Test accuracy, %, at most 10.00% of the backbone trained",
        "Test accuracy of variants, %, at most 10.00% of the backbone trained",
        "Difference to FPS, points of accuracy, at 10.00%",
        "Test accuracy, %, at most 5.00% of the backbone trained",
        "Test accuracy of variants, %, at most 5.00% of the backbone trained",
        "Difference to FPS, points of accuracy, at 5.00%",
        "Mean test accuracy, %, by share of the backbone trained",
        "Learning rates, chosen on validation images",
        "What the methods cost here, at 5.00% (cells run side by side: the times are a hint)",
    ]
    linear, gps = "linear head, frozen model", "GPS, contrastive"
    assert [[line[0] for line in table.lines] for table in found] == [
        [linear, "FPS"],
        [linear],
        [linear, "FPS"],
        ["FPS", "FPS, layer"],
        [linear, "FPS, layer"],
        [linear, "FPS", gps],
        ["FPS", "FPS, l2", "FPS, layer"],
        [linear, gps, "FPS, l2", "FPS, layer"],
        ["FPS", "FPS, layer"],
        ["FPS", gps],
        [linear, "FPS", gps, "FPS, l2", "FPS, layer"],
    ]


def test_means_by_share_are_over_the_seeds_that_all_shares_have():
    every = [
        *(trial for task in "abc" for trial in chosen("fps", task, test=0.5)),
        *(record("fps", task, 1, test=0.6) for task in "abc"),
        *(record("fps", task, 2, test=1.0) for task in "abc"),
        *(record("fps", task, seed, test=0.7 + 0.1 * seed, share=0.2) for task in "abc" for seed in (0, 1)),
        *(record("fps", task, 2, test=1.0, share=0.2) for task in "ab"),  # a seed without all tasks
        *(record("fps", task, test=0.1, share=0.005) for task in "ab"),  # a share without
        *(trial for task in "abc" for trial in chosen("gps", task)),  # a method of one share
        *(trial for task in "abc" for trial in chosen("random", task)),
        *(record("random", task, 1, share=0.2) for task in "abc"),  # no seed in common
        *(record("linear", task, share=None, rate=None) for task in "abc"),
    ]
    table = budget_table(Results(every, SETTING))
    assert table.header == ("method", "seeds", "0.5%", "5%", "20%")
    assert table.lines == (("FPS", "2", "", "55.0 ± 5.0", "75.0 ± 5.0"),)


def test_a_baseline_that_has_no_share(results):
    table = tables(results, "linear")[1]
    assert table.title == "Difference to linear head, frozen model, points of accuracy, at 5.00%"
    # fps by task, both seeds, but linear has seed 0 alone: 0.5 - 0.2, 0.7 - 0.3, 0.9 - 0.5
    assert [line[:2] + line[4:] for line in table.lines] == [
        ("FPS", "+36.67", "3", "better"),
        ("GPS, contrastive", "+25.00", "2", "noise"),
    ]


def test_methods_without_a_share_alone():
    records = [record("linear", task, test=0.25, share=None, rate=None) for task in "ab"]
    found = tables(Results(records, SETTING), "gps")
    assert [table.title for table in found[:2]] == [
        "Test accuracy, %",
        "Difference to GPS, contrastive, points of accuracy",
    ]
    assert found[0].lines == (("linear head, frozen model", "5.00", "1", "25.0", "25.0", "25.0", "25.0", "25.0"),)
    assert found[1].lines == ()
    assert found[2].lines == ()


def test_nothing_has_been_run():
    assert [table.lines for table in tables(Results([], SETTING), "gps")] == [(), (), (), ()]


@pytest.mark.parametrize(
    ("estimate", "text"),
    [(Estimate(0.12345, None), "12.3"), (Estimate(0.5, 0.01234), "50.0 ± 1.2"), (Estimate(1, 0), "100.0 ± 0.0")],
)
def test_percent(estimate, text):
    assert show(estimate) == text
