"""What stands in for missing evidence, and how evidence becomes scores."""

from typing import Any

import pytest
import torch
from torch import Tensor

from peft_fps import FPSConfig
from peft_fps.calibration import InputStatistics
from peft_fps.gradients import Exact, Streaming
from peft_fps.importance import Evidence
from peft_fps.importance.importance import UNREACHED
from peft_fps.importance.random import STRIPE, random_scorer
from peft_fps.importance.scorer import scorer
from tests.support.helpers import adapted, layers_of, normal, tiny_conv, tiny_gpt2, tiny_mlp


PATH = "first"


def layer_of(model: Any, path: str = PATH) -> Any:
    return layers_of(model)[path]


def scored(evidence: Evidence, path: str = PATH, **options: Any) -> Tensor:
    """All scores of a module of `tiny_mlp`, formed in two goes."""
    layer, config = layer_of(adapted(tiny_mlp(), filled=False), path), FPSConfig(**options)
    score = scorer(layer, path, config, evidence)
    whole = score(0, layer.shape.neurons)
    assert whole.dtype == torch.float32
    assert bool((whole >= 0).all())
    assert torch.equal(torch.cat([score(0, 3), score(3, layer.shape.neurons)]), whole)
    return whole


def held(total: Tensor) -> Exact:
    accumulator = Exact()
    accumulator.add(total)
    return accumulator


def test_sums_score_by_their_magnitude():
    total = normal(12, 10)
    for importance in ("gradient", "fisher", "sensitivity", "movement", "l0"):
        assert torch.equal(scored({PATH: held(total)}, importance=importance), total.abs())


def test_a_shortlist_scores_zero_elsewhere():
    total, streaming = normal(12, 10), Streaming(1, by_neuron=False)
    streaming.add(total)
    found = scored({PATH: streaming}, importance="gradient")
    listed = total.abs() >= total.abs().flatten().topk(8).values[-1]
    assert torch.equal(found, torch.where(listed, total.abs(), 0))


@pytest.mark.parametrize("importance", ["activation", "gradient", "movement", "magnitude"])
def test_magnitude_without_evidence(importance: str):
    assert torch.equal(scored({}, importance=importance), tiny_mlp().first.weight.abs())


@pytest.mark.parametrize("importance", ["gradient", "fisher", "sensitivity", "movement", "l0"])
def test_a_module_without_gradients_comes_behind_all_others(importance: str):
    found = scored({"last": held(normal(4, 12))}, importance=importance)
    assert float(found.max()) < float(normal(4, 12).abs().min()) * 1e-20
    magnitude = tiny_mlp().first.weight.abs()
    assert torch.equal(found, magnitude * UNREACHED)
    assert torch.equal(found.argsort(stable=True), magnitude.argsort(stable=True))  # among themselves by magnitude


def test_a_module_without_inputs_is_driven_like_an_average_one():
    statistics = {"last": InputStatistics(torch.arange(12.0, dtype=torch.float64)[None], 4)}
    expected = tiny_mlp().first.weight.abs() * (66 / 12 / 4)
    torch.testing.assert_close(scored(statistics, importance="activation"), expected.detach())


def test_the_rows_of_every_kind_of_weight():
    config = FPSConfig(importance="magnitude")
    for build, path in ((tiny_gpt2, "transformer.h.0.attn.c_attn"), (tiny_conv, "grouped")):
        layer, weight = layer_of(adapted(build(), filled=False), path), build().get_submodule(path).weight
        matrix = weight.t() if build is tiny_gpt2 else weight.flatten(1)
        assert torch.equal(scorer(layer, path, config, {})(2, 7), matrix[2:7].abs())


def test_random_scores_depend_on_seed_path_and_row_alone():
    layer = layer_of(adapted(tiny_mlp(hidden=3 * STRIPE), filled=False))
    score = random_scorer(layer, PATH, 3)
    whole = score(0, 3 * STRIPE)
    assert torch.equal(score(STRIPE - 2, 2 * STRIPE + 5), whole[STRIPE - 2 : 2 * STRIPE + 5])
    assert torch.equal(random_scorer(layer, PATH, 3)(0, 5), whole[:5])
    assert not torch.equal(random_scorer(layer, PATH, 4)(0, 5), whole[:5])
    assert not torch.equal(random_scorer(layer, "last", 3)(0, 5), whole[:5])
    assert whole.unique().numel() > 0.99 * whole.numel()
    assert 0 <= float(whole.min()) < 0.01
    assert 0.99 < float(whole.max()) < 1
    assert abs(float(whole.mean()) - 0.5) < 0.02
