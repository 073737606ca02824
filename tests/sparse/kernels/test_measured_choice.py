"""The decision between algorithms, with made-up times, and products by each of them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from peft_fps.sparse.kernels import measured_choice
from peft_fps.sparse.kernels.measured_choice import RUNS, fastest, size_class
from peft_fps.sparse.products import measured_product
from tests.sparse.cases import at_entries, built
from tests.support.helpers import normal


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured_choice, "_chosen", {})


def candidates(*names: str) -> dict[str, Callable[[], str]]:
    return {name: lambda name=name: name for name in names}


def test_the_fastest_run_after_the_first_decides_once_for_each_key() -> None:
    times = {"a": [1.0, 5.0, 3.0, 4.0], "b": [9.0, 2.0, 8.0, 8.0]}  # the first run compiles
    left = {name: iter(found) for name, found in times.items()}

    def seconds(candidate: Callable[[], Any]) -> float:
        return next(left[candidate()])

    assert len(times["a"]) == 1 + RUNS
    assert [fastest("key", candidates("a", "b"), seconds) for _ in range(2)] == ["b", "b"]
    left = {name: iter(found[::-1]) for name, found in {"a": times["b"], "b": times["a"]}.items()}
    assert fastest("other key", candidates("a", "b"), seconds) == "b"
    assert fastest("key", candidates("a"), lambda candidate: 1.0) == "a"  # the other one has been switched off


def test_what_fails_is_not_taken() -> None:
    def seconds(candidate: Callable[[], Any]) -> float:
        if candidate() == "fast":
            raise RuntimeError("no memory")
        return 1.0

    assert fastest("key", candidates("fast", "slow"), seconds) == "slow"
    with pytest.raises(RuntimeError, match="no memory"):
        fastest("other", candidates("fast"), seconds)


def test_sizes_up_to_the_same_power_of_two_are_of_one_class() -> None:
    assert size_class(1, 2, 3, 4, 5, 8, 9) == (0, 1, 2, 2, 3, 3, 4)


@pytest.mark.parametrize("way", [0, 1])
@pytest.mark.parametrize("all_columns", [True, False])
def test_every_way_gives_the_product(way: int, all_columns: bool) -> None:
    rows = [[0, 3], [], [1, 2, 3], [4]]
    structure, grad, x = built(rows, 6), normal(7, 4), normal(7, 6, seed=1)
    keys = []

    def choose(key: Any, found: Any) -> str:
        keys.append(key)
        return list(found)[way]

    values, sums = measured_product(grad, x if all_columns else x[:, :5], structure, choose)
    torch.testing.assert_close(values, at_entries(grad.t() @ x, rows))
    torch.testing.assert_close(sums, grad.sum(0))
    assert keys == [(grad.device, torch.float32, (3, 2, 3, 3))]
