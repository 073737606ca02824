"""Sums over batches, all of them or those of a shortlist, against adding up by hand."""

import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from peft_fps.gradients import Accumulator, Exact, Streaming
from peft_fps.gradients.accumulate import SHORTLIST
from tests.selection.naive import best
from tests.support.helpers import normal


TERMS = [normal(6, 40, seed=seed) for seed in range(3)]


def add_all(accumulator: Accumulator, terms: list[Tensor]) -> Accumulator:
    for term in terms:
        accumulator.add(term)
    return accumulator


def shortlist(term: Tensor, entries: int, by_neuron: bool) -> Tensor:
    """Where a shortlist has its entries, found by sorting in plain Python."""
    neurons, inputs = term.shape
    found = torch.zeros(neurons, inputs, dtype=torch.bool)
    if by_neuron:
        for row in range(neurons):
            length = min(-(-SHORTLIST * entries // neurons), inputs)
            found[row, best(list(zip(term[row].abs().tolist(), range(inputs), strict=True)), length)] = True
    else:
        flat = list(zip(term.abs().flatten().tolist(), range(neurons * inputs), strict=True))
        found.view(-1)[best(flat, min(SHORTLIST * entries, neurons * inputs))] = True
    return found


def elements(accumulator: Accumulator) -> int:
    """Bytes of all tensors that it holds."""
    return sum(t.numel() * t.element_size() for t in vars(accumulator).values() if isinstance(t, Tensor))


@pytest.mark.parametrize("device", [None, torch.device("cpu")], ids=["", "cpu"])
def test_exact_sums_are_sums(device: torch.device | None):
    accumulator = add_all(Exact(device), TERMS)
    expected = TERMS[0] + TERMS[1] + TERMS[2]
    assert torch.equal(accumulator.rows(0, 6), expected)
    assert torch.equal(accumulator.rows(2, 5), expected[2:5])


@pytest.mark.parametrize("transposed", [False, True])
def test_exact_sums_do_not_write_to_what_was_added(transposed: bool):
    terms = [normal(40, 6, seed=seed).t() if transposed else normal(6, 40, seed=seed) for seed in range(2)]
    before = [term.clone() for term in terms]
    accumulator = add_all(Exact(), terms)
    assert torch.equal(accumulator.rows(0, 6), before[0] + before[1])
    assert accumulator.rows(0, 6).is_contiguous()
    assert all(torch.equal(term, kept) for term, kept in zip(terms, before, strict=True))


@pytest.mark.parametrize("build", [Exact, lambda: Streaming(3, True)], ids=["exact", "streaming"])
def test_nothing_that_was_added_is_kept_alive(build):
    accumulator, term = build(), normal(6, 40)
    gone = weakref.ref(term)
    accumulator.add(term)
    del term
    assert gone() is None


@pytest.mark.parametrize("build", [Exact, lambda: Streaming(3, True), lambda: Streaming(3, False)])
def test_whether_it_was_reached(build):
    accumulator = build()
    assert not accumulator.reached
    assert accumulator.is_finite()
    accumulator.add(torch.zeros(6, 40))  # a gradient of zero is one
    assert accumulator.reached
    assert accumulator.is_finite()
    assert torch.equal(accumulator.rows(0, 6), torch.zeros(6, 40))


@given(st.integers(0, 30), st.booleans(), st.integers(0, 6), st.integers(0, 6))
def test_streaming_sums_those_that_were_largest_in_the_first_batch(entries: int, by_neuron: bool, one: int, two: int):
    accumulator = add_all(Streaming(entries, by_neuron), TERMS)
    listed = shortlist(TERMS[0], entries, by_neuron)
    expected = torch.where(listed, TERMS[0] + TERMS[1] + TERMS[2], 0)
    first, last = min(one, two), max(one, two)
    torch.testing.assert_close(accumulator.rows(first, last), expected[first:last], rtol=0, atol=1e-6)
    assert bool((accumulator.rows(0, 6) != 0).eq(listed).all())


@pytest.mark.parametrize("by_neuron", [True, False])
def test_streaming_is_exact_if_the_shortlist_holds_everything(by_neuron: bool):
    streaming, exact = add_all(Streaming(30, by_neuron), TERMS), add_all(Exact(), TERMS)
    assert torch.equal(streaming.rows(0, 6), exact.rows(0, 6))


@pytest.mark.parametrize("by_neuron", [True, False])
def test_streaming_finds_the_largest_if_all_batches_are_alike(by_neuron: bool):
    streaming, exact = (add_all(a, [TERMS[0]] * 4).rows(0, 6).abs() for a in (Streaming(6, by_neuron), Exact()))
    if by_neuron:
        assert torch.equal(streaming.topk(8).indices, exact.topk(8).indices)
    else:
        assert torch.equal(streaming.flatten().topk(48).indices, exact.flatten().topk(48).indices)


def test_streaming_misses_what_becomes_large_later():
    late = TERMS[1].clone()
    row = int(TERMS[0].abs()[:, 0].argmin())
    assert not shortlist(TERMS[0], 6, True)[row, 0]
    late[row, 0] = 1e6
    assert add_all(Streaming(6, True), [TERMS[0], late]).rows(0, 6)[row, 0] == 0
    assert add_all(Streaming(6, True), [late, TERMS[0]]).rows(0, 6)[row, 0] > 1e5


@pytest.mark.parametrize("by_neuron", [True, False])
def test_streaming_holds_less(by_neuron: bool):
    term, entries = normal(20, 768), 20 * 5
    streaming, exact = add_all(Streaming(entries, by_neuron), [term]), add_all(Exact(), [term])
    assert elements(exact) == 20 * 768 * 4
    assert elements(streaming) <= SHORTLIST * entries * (8 + 4) + 100
    assert elements(streaming) < elements(exact) / 5


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize(
    "build", [Exact, lambda: Streaming(1, True), lambda: Streaming(1, False)], ids=["exact", "by-neuron", "by-module"]
)
def test_any_number_that_is_not_finite_is_noticed(build, batch: int, value: float):
    terms = [term.clone() for term in TERMS]
    place = divmod(int(TERMS[0].abs().argmin()), 40)  # on no shortlist
    assert not shortlist(TERMS[0], 1, True)[place]
    terms[batch][place] = value
    assert not add_all(build(), terms).is_finite()
    assert add_all(build(), TERMS).is_finite()
