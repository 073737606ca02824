"""Budgets: laws for random networks, and the arithmetic of ViT-B/16 and the papers."""

import re
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from peft_fps.selection import Allocation, LayerShape, SelectionReport, allocate


class Layer(NamedTuple):
    """Shape of a weight, and whether a bias is trained along."""

    neurons: int
    inputs: int
    bias: bool


Layers = dict[str, Layer]

SHAPES = st.builds(Layer, neurons=st.integers(1, 40), inputs=st.integers(1, 60), bias=st.booleans())
NETWORKS = st.lists(SHAPES, min_size=1, max_size=5).map(lambda shapes: {f"layer{i}": s for i, s in enumerate(shapes)})


def vit_b16() -> Layers:
    """The 49 matrices of ViT-B/16 with query, key and value fused, as in timm."""
    layers = {"patch_embed.proj": Layer(768, 16 * 16 * 3, True)}
    for i in range(12):
        layers |= {
            f"blocks.{i}.attn.qkv": Layer(2304, 768, True),
            f"blocks.{i}.attn.proj": Layer(768, 768, True),
            f"blocks.{i}.mlp.fc1": Layer(3072, 768, True),
            f"blocks.{i}.mlp.fc2": Layer(768, 3072, True),
        }
    return layers


NEURONS = 83_712
PARAMETERS = 85_798_656  # with class token, position embedding and layer norms, without the head

# classes of the 19 tasks of VTAB-1k
CLASSES = {
    "caltech101": 102,
    "cifar100": 100,
    "clevr_count": 8,
    "clevr_dist": 6,
    "diabetic_retinopathy": 5,
    "dmlab": 6,
    "dsprites_loc": 16,
    "dsprites_ori": 16,
    "dtd": 47,
    "eurosat": 10,
    "flowers102": 102,
    "kitti": 4,
    "patch_camelyon": 2,
    "pets": 37,
    "resisc45": 45,
    "smallnorb_azi": 18,
    "smallnorb_ele": 9,
    "sun397": 397,
    "svhn": 10,
}


def allocated(layers: Layers, norms: int = 0, **options: Any) -> Allocation:
    """With the biases of the layers, and those of norms besides."""
    shapes = {name: LayerShape(layer.neurons, layer.inputs) for name, layer in layers.items()}
    return allocate(shapes, biases=bias_count(layers) + norms, **options)


def by_budget(layers: Layers, parameters: int, budget: float, **options: Any) -> Allocation:
    return allocated(layers, base_parameters=parameters, budget=budget, per_neuron=None, **options)


def by_k(layers: Layers, k: float, **options: Any) -> Allocation:
    return allocated(layers, base_parameters=10**6, budget=None, per_neuron=k, **options)


def weights(layers: Layers) -> int:
    return sum(shape.neurons * shape.inputs for shape in layers.values())


def bias_count(layers: Layers) -> int:
    return sum(shape.neurons for shape in layers.values() if shape.bias)


def decimal_floor(share: float, whole: int) -> int:
    return int(Decimal(repr(share)) * whole)


# --- ViT-B/16 and the papers ----------------------------------------------------------------------------------------


def test_vit_b16_has_the_papers_neurons_and_parameters():
    layers = vit_b16()
    others = 768 + 197 * 768 + 25 * 2 * 768  # class token, position embedding, layer norms
    assert sum(shape.neurons for shape in layers.values()) == NEURONS == 768 + 12 * (2304 + 768 + 3072 + 768)
    assert weights(layers) + NEURONS + others == PARAMETERS


@pytest.mark.parametrize("k", [1, 2, 3, 5, 15, 20])
def test_vit_b16_by_k(k: int):
    found = by_k(vit_b16(), k)
    assert sum(found.entries.values()) == NEURONS * k
    assert (found.biases, found.trained, found.limit) == (NEURONS, NEURONS * (k + 1), None)
    assert found.entries["blocks.3.mlp.fc2"] == 768 * k


def test_vit_b16_by_the_default_budget():
    found = by_budget(vit_b16(), PARAMETERS, 0.0077)
    limit = 660_649  # floor of 660,649.65
    assert found.limit == limit
    assert limit - 49 < found.trained <= limit
    k = Fraction(limit - NEURONS, NEURONS)  # between 6 and 7
    assert found.entries["blocks.0.attn.qkv"] == int(2304 * k)
    assert found.entries["patch_embed.proj"] == int(768 * k)


def test_one_entry_per_neuron_is_the_papers_quarter_per_cent_on_vtab():
    shares = []
    for task, classes in CLASSES.items():
        k = 2 if task in ("patch_camelyon", "diabetic_retinopathy") else 1
        allocation = by_k(vit_b16(), k)
        report = SelectionReport((), PARAMETERS, 769 * classes, 0, None, "")
        shares.append(report.share_with_head + allocation.trained / PARAMETERS)
    assert len(shares) == 19
    assert 100 * sum(shares) / len(shares) == pytest.approx(0.2497, abs=5e-5)


# --- laws -----------------------------------------------------------------------------------------------------------


@given(NETWORKS, st.integers(0, 10_000), st.floats(2.0**-13, 1, width=32))
def test_a_budget_is_used_up_and_never_exceeded(layers: Layers, other_parameters: int, budget: float):
    parameters = weights(layers) + bias_count(layers) + other_parameters
    limit = decimal_floor(budget, parameters)
    biases = bias_count(layers)
    if biases > limit:
        with pytest.raises(ValueError, match="biases of the targeted modules alone"):
            by_budget(layers, parameters, budget)
        return
    assume(biases or limit >= len(layers))  # below, rounding may leave nothing to train, which is refused
    found = by_budget(layers, parameters, budget)
    assert (found.biases, found.limit) == (biases, limit)
    assert found.trained <= limit
    full = [name for name, shape in layers.items() if found.entries[name] == shape.neurons * shape.inputs]
    assert limit - found.trained < len(layers) or len(full) == len(layers)
    # one K for all: below the fan-in of every layer that is not full, above that of every other
    low = max((Fraction(found.entries[name], shape.neurons) for name, shape in layers.items()), default=Fraction(0))
    high = [Fraction(found.entries[name] + 1, shape.neurons) for name, shape in layers.items() if name not in full]
    assert all(low < bound for bound in high)
    assert all(found.entries[name] <= shape.neurons * shape.inputs for name, shape in layers.items())


@given(NETWORKS, st.floats(0, 80, width=32))
def test_k_is_the_same_for_all_neurons_up_to_their_fan_in(layers: Layers, k: float):
    exact = Fraction(Decimal(repr(k)))
    expected = {name: min(int(exact * shape.neurons), shape.neurons * shape.inputs) for name, shape in layers.items()}
    if sum(expected.values()) + bias_count(layers) == 0:
        with pytest.raises(ValueError, match="Nothing would be trained"):
            by_k(layers, k)
    else:
        found = by_k(layers, k)
        assert found.entries == expected
        assert list(found.entries) == list(layers)
        assert found.trained == sum(expected.values()) + bias_count(layers)


@given(NETWORKS, st.lists(st.floats(0.5, 1, width=32), min_size=2, max_size=4).map(sorted))
def test_more_budget_never_means_fewer_entries(layers: Layers, budgets: list[float]):
    parameters = weights(layers) + 2 * bias_count(layers) + 100  # so that something always fits
    found = [by_budget(layers, parameters, budget).entries for budget in budgets]
    assert all(low[name] <= high[name] for low, high in pairwise(found) for name in layers)


@pytest.mark.parametrize(
    ("available", "expected"),
    [(9, (3, 6)), (30, (10, 20)), (33, (11, 22)), (60, (20, 40)), (61, (20, 41)), (500, (20, 480)), (501, (20, 480))],
)
def test_a_layer_with_a_small_fan_in_leaves_its_rest_to_the_others(available: int, expected: tuple[int, int]):
    layers = {"small": Layer(10, 2, False), "large": Layer(20, 24, False)}
    assert tuple(by_budget(layers, 1000, available / 1000).entries.values()) == expected


@pytest.mark.parametrize(
    ("budget", "parameters", "limit"),
    [(0.29, 100, 29), (0.07, 100, 7), (0.57, 100, 57), (1e-5, 100_000, 1), (1, 9, 9)],
)
def test_a_budget_means_the_decimal_number_that_was_written(budget: float, parameters: int, limit: int):
    layers = {"only": Layer(1, 1000, False)}
    assert by_budget(layers, parameters, budget).entries == {"only": limit}


def test_k_above_the_fan_in_means_the_fan_in():
    layers = {"patch": Layer(4, 3, True), "block": Layer(5, 100, False)}
    assert by_k(layers, 20).entries == {"patch": 12, "block": 100}
    assert by_k(layers, 1e9).entries == {"patch": 12, "block": 500}


@pytest.mark.parametrize("options", [{"budget": 0, "per_neuron": None}, {"budget": None, "per_neuron": 0}], ids=str)
def test_a_budget_of_zero_is_bitfit(options: dict[str, float | None]):
    layers = {"with": Layer(4, 3, True), "without": Layer(5, 100, False)}
    found = allocated(layers, base_parameters=1000, **options)
    assert found.entries == {"with": 0, "without": 0}
    assert (found.biases, found.trained) == (4, 4)


# --- patterns -------------------------------------------------------------------------------------------------------


TWO = {
    "block.0.query": Layer(10, 100, True),
    "block.0.value": Layer(10, 100, True),
    "block.1.query": Layer(10, 100, True),
    "head": Layer(5, 10, False),
}


def test_pattern_with_k():
    found = by_k(TWO, 2, budget_pattern={"query": 7, "block.1.query": 1, "head": 0})
    # the longest that matches wins, and the end of a name is enough
    assert found.entries == {"block.0.query": 70, "block.0.value": 20, "block.1.query": 10, "head": 0}


def test_pattern_with_a_share_of_the_module_leaves_the_rest_to_the_others():
    found = by_budget(TWO, 10_000, 0.04, budget_pattern={r"block\.\d+\.query": 0.1})
    # 400 less 30 biases and 200 entries leaves 170 for 15 neurons with fan-in 100 or 10: the head is full
    assert found.entries == {"block.0.query": 100, "block.0.value": 120, "block.1.query": 100, "head": 50}
    assert found.trained == 400


def test_pattern_matches_whole_names_only():
    with pytest.raises(ValueError, match=r"budget_pattern key 'uery' matches none of the 4 .* 'block.0.query'"):
        by_k(TWO, 2, budget_pattern={"uery": 3})
    with pytest.raises(ValueError, match="'block.0' matches none"):
        by_budget(TWO, 10_000, 0.1, budget_pattern={"block.0": 0.5})


def test_pattern_beyond_the_budget_is_refused_with_the_numbers():
    with pytest.raises(ValueError, match=r"budget=0.04 allows 400 of 10,000 .* take 1,030"):
        by_budget(TWO, 10_000, 0.04, budget_pattern={"block.0.query": 1.0})


def test_pattern_for_every_module():
    found = by_budget(TWO, 10_000, 0.5, budget_pattern={".*": 0.1})
    assert found.entries == {"block.0.query": 100, "block.0.value": 100, "block.1.query": 100, "head": 5}


# --- refusals -------------------------------------------------------------------------------------------------------


def test_biases_beyond_the_budget_are_refused_with_the_numbers_and_both_ways_out():
    with pytest.raises(ValueError, match="biases") as caught:
        by_budget(vit_b16(), PARAMETERS, 0.0005)
    message = str(caught.value)
    for part in ("budget=0.0005", "42,899", "85,798,656", "83,712", "0.00098", "bias='none'"):
        assert part in message
    assert by_budget(vit_b16(), PARAMETERS, 0.00098).biases == NEURONS
    frozen = {name: Layer(shape.neurons, shape.inputs, False) for name, shape in vit_b16().items()}
    assert 42_899 - 49 < by_budget(frozen, PARAMETERS, 0.0005).trained <= 42_899


@given(st.integers(1, 5000), st.integers(1, 10**9))
def test_the_budget_that_a_refusal_names_is_enough(neurons: int, other_parameters: int):
    layers = {"only": Layer(neurons, 3, True)}
    parameters = 4 * neurons + other_parameters
    try:
        assert by_budget(layers, parameters, 1e-9).trained >= neurons
    except ValueError as error:
        named = re.search(r"at least (\S+),", str(error))
        assert named is not None
        assert by_budget(layers, parameters, float(named[1])).biases == neurons


@pytest.mark.parametrize(
    "options", [{"budget": 0.0, "per_neuron": None}, {"budget": None, "per_neuron": 0.01}], ids=str
)
def test_an_adapter_that_trains_nothing_is_refused(options: dict[str, float | None]):
    with pytest.raises(ValueError, match=r"Nothing would be trained: .*=0.* 1 targeted modules.*bias='all'"):
        allocated({"only": Layer(10, 5, False)}, base_parameters=100, **options)


# --- biases of norms ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "entries"),
    [({"budget": 0.06, "per_neuron": None}, 37), ({"budget": None, "per_neuron": 3}, 30), ({"budget": 0.023}, 0)],
    ids=["budget", "per neuron", "biases alone"],
)
def test_biases_of_norms_count(options: dict[str, float], entries: int):
    layers = {"linear": Layer(10, 40, True)}
    found = allocated(layers, 13, base_parameters=1000, **{"budget": None, "per_neuron": None, **options})
    assert found.entries == {"linear": entries}
    assert (found.biases, found.trained) == (23, 23 + entries)


def test_biases_alone_are_refused_when_they_exceed_the_budget():
    with pytest.raises(ValueError, match=r"allows 12 .* biases of the targeted modules alone are 13.* 0.013"):
        by_budget({}, 1000, 0.012, norms=13)
    found = by_budget({}, 1000, 0.013, norms=13)
    assert (found.entries, found.biases, found.trained) == ({}, 13, 13)


@given(NETWORKS, st.integers(1, 40), st.integers(1, 500))
def test_norms_take_their_biases_of_the_budget_and_nothing_else(layers: Layers, norms: int, left: int):
    biases, total = bias_count(layers), 1 << 14  # so that a budget of n / total is exact
    assume(left >= len(layers) + sum(layer.neurons for layer in layers.values()))  # something is trained in any case
    alone = by_budget(layers, total, (biases + left) / total)
    found = by_budget(layers, total, (biases + norms + left) / total, norms=norms)
    assert (found.entries, found.biases) == (alone.entries, alone.biases + norms)
