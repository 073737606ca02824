import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_fps.benchmarks.transfer.uneven_budget import (
    in_proportion,
    outlier_share,
    shares_by_outliers,
    shares_by_tails,
    tail_exponent,
)
from peft_fps.selection import LayerShape
from tests.support.helpers import normal


def test_outliers_are_scores_above_five_times_the_mean_of_their_block():
    scores = {"blocks.0.a": torch.ones(4, 6), "blocks.0.b": torch.ones(16), "blocks.1.a": torch.ones(9), "stem": None}
    scores["blocks.0.a"][0, :2] = 100  # mean of the block 5.95
    scores["blocks.1.a"][0] = 5  # mean 13 / 9, 5 times that is more
    scores["stem"] = torch.tensor([0.0, 0, 0, 0, 0, 0, 1, 9])
    assert outlier_share([scores["blocks.0.a"], scores["blocks.0.b"]]) == 2 / 40
    found = shares_by_outliers({}, scores)
    assert found == {"blocks.0.a": 0.05, "blocks.0.b": 0.05, "blocks.1.a": 0, "stem": 1 / 8}


@pytest.mark.parametrize(("neurons", "inputs"), [(8, 12), (9, 5)])
def test_tail_exponent_is_hills_over_the_larger_half_of_the_eigenvalues(neurons, inputs):
    weight = normal(neurons, inputs)
    matrix = weight.double().numpy()
    matrix = matrix if neurons < inputs else matrix.T
    eigenvalues = sorted(np.linalg.eigvalsh(matrix @ matrix.T))
    tail = eigenvalues[len(eigenvalues) // 2 :]
    expected = 1 + len(tail) / sum(np.log(value / tail[0]) for value in tail)
    assert tail_exponent(weight) == pytest.approx(expected)


def test_the_heaviest_tail_gets_the_most():
    weights = {name: torch.diag(torch.arange(1.0, 21) ** power) for name, power in (("a", 1), ("b", 4), ("c", 2))}
    exponents = {name: tail_exponent(weight) for name, weight in weights.items()}
    found = shares_by_tails(weights, {})
    assert exponents["b"] < exponents["c"] < exponents["a"]
    assert found["b"] == pytest.approx(1.3)
    assert found["a"] == pytest.approx(0.7)
    between = (exponents["a"] - exponents["c"]) / (exponents["a"] - exponents["b"])
    assert found["c"] == pytest.approx(0.7 + 0.6 * between)
    assert shares_by_tails({"only": weights["a"]}, {})["only"] == pytest.approx(1.3)


LAYERS = st.lists(
    st.tuples(st.integers(1, 6), st.integers(1, 6), st.floats(0, 4, allow_subnormal=False)), min_size=1, max_size=4
)


@given(LAYERS, st.floats(0, 1))
def test_entries_are_the_total_and_in_proportion(sizes, part):
    layers = {str(i): LayerShape(neurons, inputs) for i, (neurons, inputs, _) in enumerate(sizes)}
    shares = {str(i): share for i, (_, _, share) in enumerate(sizes)}
    total = int(part * sum(layer.weights for layer in layers.values()))
    entries = in_proportion(layers, shares, total)
    assert sum(entries.values()) == total
    assert all(0 <= entries[name] <= layer.weights for name, layer in layers.items())
    for one, layer in layers.items():
        for other, another in layers.items():
            if entries[one] < layer.weights - 1 and entries[other] and shares[other] <= shares[one]:
                # one entry of rounding in each
                per_neuron, at_least = (entries[one] + 1) / layer.neurons, (entries[other] - 1) / another.neurons
                assert per_neuron >= at_least * (shares[one] / shares[other] if shares[other] else 1) * (1 - 1e-9)


def test_entries_of_an_example():
    layers = {"wide": LayerShape(4, 100), "narrow": LayerShape(10, 1), "other": LayerShape(2, 50)}
    assert in_proportion(layers, {"wide": 1, "narrow": 1, "other": 2}, 8) == {"wide": 2, "narrow": 4, "other": 2}
    # 10 entries fill the narrow layer, and the rest is shared 1 : 2 by neuron
    assert in_proportion(layers, {"wide": 1, "narrow": 9, "other": 2}, 26) == {"wide": 8, "narrow": 10, "other": 8}
    assert in_proportion(layers, dict.fromkeys(layers, 0), 16) == {"wide": 4, "narrow": 10, "other": 2}
