"""Passes over data: which batches, how often, and how many there were."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from peft_fps.calibration import Pass, device_of, is_distributed


class Stream:
    """Iterable more than once, of unknown length."""

    def __iter__(self) -> Iterator[int]:
        return iter([10, 11, 12])


def drawn(data: Any, **options: Any) -> list[tuple[int, Any]]:
    return list(Pass(data, progress=False, **options))


@pytest.mark.parametrize(
    "data", [[10, 11, 12], (10, 11, 12), iter([10, 11, 12]), Stream()], ids=lambda d: type(d).__name__
)
def test_batches_are_numbered(data: Any):
    assert drawn(data) == [(0, 10), (1, 11), (2, 12)]


@pytest.mark.parametrize("data", [[10, 11, 12], Stream()], ids=["list", "stream"])
@pytest.mark.parametrize("num_batches", [None, 1, 2, 3, 9])
@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_every_epoch_begins_anew(data: Any, num_batches: int | None, epochs: int):
    expected = [10, 11, 12][:num_batches] * epochs
    found = Pass(data, num_batches=num_batches, epochs=epochs, progress=False)
    assert list(found) == list(enumerate(expected))
    assert found.counts == {"batches": len(expected), "examples": 0}


def test_no_batch_is_drawn_that_is_not_used():
    source = iter(range(5))
    assert drawn(source, num_batches=2) == [(0, 0), (1, 1)]
    assert next(source) == 2


def test_examples_become_batches():
    rows = [{"x": torch.tensor([float(i)])} for i in range(5)]
    found = drawn(rows, collator=lambda part: [float(row["x"]) for row in part], batch_size=2)
    assert found == [(0, [0.0, 1.0]), (1, [2.0, 3.0]), (2, [4.0])]


def test_a_shuffled_loader_shuffles_in_every_epoch():
    loader = DataLoader(TensorDataset(torch.arange(100)), batch_size=100, shuffle=True)
    (_, (one,)), (_, (two,)) = drawn(loader, epochs=2)
    assert not torch.equal(one, two)
    assert torch.equal(one.sort().values, two.sort().values)


@pytest.mark.parametrize("value", [0, -1, 1.5, "3"])
def test_a_number_of_batches_that_is_none(value: Any):
    with pytest.raises(ValueError, match=f"num_batches is {value!r}, expected an integer of at least 1"):
        Pass([1], num_batches=value)


def test_refusals_say_who_needs_the_data():
    with pytest.raises(ValueError, match="importance='movement' needs data, found None"):
        Pass(None, purpose="importance='movement'")
    with pytest.raises(ValueError, match="importance='l0' needs 2 passes over the data, found an iterator"):
        Pass(iter([1]), epochs=2, purpose="importance='l0'")
    with pytest.raises(ValueError, match="found an iterator"):
        Pass((i for i in range(3)), epochs=2)
    with pytest.raises(TypeError, match="single dict"):
        Pass({"x": 1})


@pytest.mark.parametrize(
    "data", [[], iter(()), DataLoader(TensorDataset(torch.zeros(0, 1)))], ids=["list", "it", "loader"]
)
def test_no_batch_at_all(data: Any):
    with pytest.raises(ValueError, match="holds no batch.*Nothing was changed"):
        drawn(data)


@pytest.mark.parametrize(("epochs", "num_batches", "total"), [(1, None, 3), (2, None, 6), (2, 2, 4), (1, 9, 3)])
def test_the_progress_bar_knows_the_total(
    epochs: int, num_batches: int | None, total: int, capsys: pytest.CaptureFixture[str]
):
    list(Pass([1, 2, 3], epochs=epochs, num_batches=num_batches))
    output, errors = capsys.readouterr()
    assert output == ""
    assert f"{total}/{total}" in errors
    drawn([1, 2, 3])
    assert capsys.readouterr().err == ""


def test_counts_of_one_process_are_its_own():
    found = Pass([1, 2], progress=False)
    for _ in found:
        found.counts["examples"] += 4
    counts = found.finish(torch.device("cpu"))
    assert counts == {"batches": 2, "examples": 8}
    counts["batches"] = 0
    assert found.counts["batches"] == 2
    assert not is_distributed()


def test_the_device_that_inputs_go_to():
    model = nn.Sequential(nn.Linear(2, 2, device="meta"), nn.Linear(2, 2))
    assert device_of(model) == torch.device("cpu")
    assert device_of(nn.ReLU()) == torch.device("cpu")
