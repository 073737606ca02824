import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from peft_fps.benchmarks.transfer.estimates import Estimate, holm, over_seeds, paired


ACCURACY = st.floats(0, 1)
ACCURACIES = st.dictionaries(st.sampled_from("abcd"), st.dictionaries(st.integers(0, 3), ACCURACY), max_size=4)


@given(st.lists(ACCURACY, min_size=2, max_size=9))
def test_an_estimate_is_the_mean_with_its_standard_error(values):
    found = Estimate.of(values)
    assert found.mean == pytest.approx(np.mean(values))
    assert found.error == pytest.approx(stats.sem(values), abs=1e-12)


def test_one_value_has_no_standard_error():
    assert Estimate.of([0.25]) == Estimate(0.25, None)


def test_means_over_tasks_of_the_seeds_that_all_tasks_have():
    accuracies = {"a": {0: 0.1, 1: 0.3, 2: 1.0}, "b": {1: 0.5, 0: 0.2}, "c": {0: 1.0}}
    found = over_seeds(accuracies, ["a", "b"])
    assert found.mean == pytest.approx((0.15 + 0.4) / 2)
    assert found.error == pytest.approx(stats.sem([0.15, 0.4]))
    assert over_seeds(accuracies, ["a", "c"]) == Estimate(pytest.approx(0.55), None)


@pytest.mark.parametrize("tasks", [["a", "b"], ["a", "c"]])
def test_no_seed_in_common(tasks):
    with pytest.raises(ValueError, match=f"No seed was run on all of the tasks {', '.join(tasks)}"):
        over_seeds({"a": {0: 0.1}, "b": {1: 0.5}}, tasks)


@given(ACCURACIES, ACCURACIES)
def test_paired_differences_are_students_interval_over_task_means(accuracies, baseline):
    by_task, pairs = [], 0
    for task in "abcd":
        common = [s for s in range(4) if s in accuracies.get(task, {}) and s in baseline.get(task, {})]
        if common:
            by_task.append(np.mean([accuracies[task][s] - baseline[task][s] for s in common]))
            pairs += len(common)
    found = paired(accuracies, baseline)
    if len(by_task) < 2:
        assert found is None
        return
    margin = stats.t.ppf(0.975, len(by_task) - 1) * np.std(by_task, ddof=1) / np.sqrt(len(by_task))
    assert found is not None
    assert found.mean == pytest.approx(np.mean(by_task), abs=1e-12)
    assert found.high - found.mean == pytest.approx(margin, abs=1e-9)
    assert found.mean - found.low == pytest.approx(margin, abs=1e-9)
    assert found.pairs == pairs


def test_the_interval_is_the_one_of_scipys_test():
    accuracies = {"a": {0: 0.9, 1: 0.7}, "b": {0: 0.5}, "c": {0: 0.4, 1: 0.6, 2: 0.0}}
    baseline = {"a": {0: 0.6, 1: 0.6}, "b": {0: 0.45}, "c": {0: 0.4, 1: 0.3, 3: 1.0}, "d": {0: 0.0}}
    found = paired(accuracies, baseline)
    expected = stats.ttest_1samp([0.2, 0.05, 0.15], 0).confidence_interval(0.95)
    assert found is not None
    assert (found.low, found.high) == (pytest.approx(expected.low), pytest.approx(expected.high))
    assert found.pairs == 5
    assert found.p == pytest.approx(stats.ttest_1samp([0.2, 0.05, 0.15], 0).pvalue)


@pytest.mark.parametrize(("difference", "p"), [(0.25, 0.0), (0.0, 1.0)])
def test_tasks_that_differ_alike_leave_no_doubt(difference, p):
    found = paired({"a": {0: 0.5 + difference}, "b": {0: 0.5 + difference}}, {"a": {0: 0.5}, "b": {0: 0.5}})
    assert found is not None
    assert (found.p, found.low, found.high) == (p, difference, difference)


def test_holms_correction_of_an_example():
    # sorted 0.005, 0.01, 0.03, 0.04: times 4, 3, 2, 1, none less than the one before
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.001, 0.999))
def test_holms_procedure_rejects_what_the_corrected_values_say(values, level):
    rejected: set[int] = set()
    for rank, place in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        if values[place] * (len(values) - rank) > level:
            break
        rejected.add(place)
    assert {place for place, value in enumerate(holm(values)) if value <= level} == rejected


@pytest.mark.parametrize(
    ("differences", "noise"),
    [([0.1, 0.12, 0.11], False), ([-0.1, -0.12, -0.11], False), ([0.3, -0.1, 0.05], True), ([0.0, 0.0], True)],
)
def test_noise_is_an_interval_that_holds_zero(differences, noise):
    accuracies = {f"task{number}": {0: 0.5 + difference} for number, difference in enumerate(differences)}
    found = paired(accuracies, {task: {0: 0.5} for task in accuracies})
    assert found is not None
    assert found.noise is noise
