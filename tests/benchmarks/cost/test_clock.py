import pytest

from peft_fps.benchmarks.cost.clock import Times, interleave
from peft_fps.benchmarks.cost.device_timer import read_cpu


def test_tasks_take_turns_and_the_first_round_does_not_count():
    now, called = [0.0], []

    def task(name, durations):
        durations = iter(durations)

        def run():
            called.append(name)
            now[0] += next(durations)

        return run

    tasks = {"a": task("a", [100, 1, 5, 2]), "b": task("b", [100, 10, 30, 40])}
    times = interleave(tasks, 3, read=lambda task: read_cpu(task, lambda: now[0]))
    assert called == ["a", "b"] * 4
    assert times == {"a": Times((1, 5, 2)), "b": Times((10, 30, 40))}


@pytest.mark.parametrize(("seconds", "median"), [((3.0, 1.0, 2.0), 2.0), ((4.0, 1.0, 2.0, 8.0), 3.0), ((7.0,), 7.0)])
def test_medians_and_spread(seconds, median):
    found = Times(seconds).to_dict()
    assert found == {"median": median, "min": min(seconds), "max": max(seconds), "all": list(seconds)}
