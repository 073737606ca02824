"""Curves of how unevenly inputs are read, against sums in plain Python and against drawing places by lot."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_fps.plots.reading import chance_concentration, concentration, input_counts
from peft_fps.selection.entries import ModuleEntries
from tests.support.helpers import csr, selections


@given(selections())
def test_inputs_are_counted(selection: tuple[int, list[list[int]]]) -> None:
    inputs, rows = selection
    counts = input_counts(ModuleEntries(*csr(rows), inputs))
    assert counts.tolist() == [sum(column in row for row in rows) for column in range(inputs)]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30).filter(any))
def test_the_curve_is_the_share_that_the_most_read_inputs_hold(counts: list[int]) -> None:
    inputs, entries = concentration(torch.tensor(counts))
    ordered = sorted(counts, reverse=True)
    assert inputs.tolist() == pytest.approx([n / len(counts) for n in range(len(counts) + 1)])
    assert entries.tolist() == pytest.approx([sum(ordered[:n]) / sum(counts) for n in range(len(counts) + 1)])


def test_a_curve_of_many_inputs_has_few_points_that_lie_on_it() -> None:
    counts = torch.arange(5000)
    inputs, entries = concentration(counts)
    assert len(inputs) == 401
    held = counts.flip(0).cumsum(0).double()
    for x, y in zip(inputs.tolist()[1:], entries.tolist()[1:], strict=True):
        assert y == pytest.approx(float(held[round(x * 5000) - 1] / held[-1]))


def test_the_curve_of_chance_is_that_of_places_drawn_by_lot() -> None:
    neurons, inputs, per_neuron, repeats = 60, 50, 2, 300
    rows = [[0, 1] for _ in range(neurons)]
    empty = ModuleEntries(*csr([[] for _ in range(5)]), inputs)
    numbers, held = chance_concentration([ModuleEntries(*csr(rows), inputs), empty])
    # expected number of inputs with each count, with the 50 of the empty module, which nobody reads
    lot, found = random.Random(0), [0.0] * (neurons + 1)
    for _ in range(repeats):
        readers = [0] * inputs
        for _ in range(neurons):
            for column in lot.sample(range(inputs), per_neuron):
                readers[column] += 1
        for count in [*readers, *[0] * inputs]:
            found[count] += 1 / repeats
    x, y = [0.0], [0.0]
    for count in reversed(range(neurons + 1)):
        x.append(x[-1] + found[count] / (2 * inputs))
        y.append(y[-1] + count * found[count] / (neurons * per_neuron))
    for share in (0.05, 0.1, 0.2, 0.3, 0.4):
        drawn = _height(x, y, share)
        assert _height(numbers.tolist(), held.tolist(), share) == pytest.approx(drawn, abs=0.015)
    assert (float(numbers[-1]), float(held[-1])) == (1.0, 1.0)


def test_chance_reads_all_inputs_alike_where_everything_is_selected() -> None:
    full = ModuleEntries(*csr([[0, 1, 2]] * 4), 3)
    numbers, held = chance_concentration([full])
    torch.testing.assert_close(numbers, held, rtol=0, atol=1e-5)


def _height(x: list[float], y: list[float], at: float) -> float:
    right = next(i for i, value in enumerate(x) if value >= at)
    left = right - 1
    return y[left] + (y[right] - y[left]) * (at - x[left]) / (x[right] - x[left])
