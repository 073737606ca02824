"""Selections by scores of one's own, against naive rankings and the package's own importances on the same numbers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peft_fps import Selection
from tests.selection import naive
from tests.support.helpers import (
    adapted,
    layers_of,
    normal,
    selected_columns,
    tiny_conv,
    tiny_gpt2,
    tiny_mlp,
    tiny_vit,
    unchanged,
    weighted_of,
)


MODELS = {"vit": tiny_vit, "gpt2": tiny_gpt2, "conv": tiny_conv, "mlp": tiny_mlp}


def fresh(base: nn.Module, **options: Any) -> Any:
    return adapted(base, filled=False, **options)


def scores_of(model: nn.Module) -> dict[str, Tensor]:
    """Scores that have nothing to do with the weights; every layer's shape is `(neurons, inputs)`."""
    return {
        path: normal(layer.shape.neurons, layer.shape.inputs, seed=seed).abs()
        for seed, (path, layer) in enumerate(weighted_of(model).items())
    }


def by_path(scores: dict[str, Any]) -> Callable[[str, Tensor], Any]:
    return lambda path, weight: scores[path]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("granularity", ["neuron", "layer"])
def test_the_best_of_every_layer_are_selected(name, granularity):
    model = fresh(MODELS[name](), per_neuron=1.5, granularity=granularity)
    scores = scores_of(model)
    with unchanged(model):
        selection = Selection.from_scores(model, by_path(scores))
    selection.apply(model)
    best = naive.by_neuron if granularity == "neuron" else naive.by_layer
    for path, layer in layers_of(model).items():
        entries = int(1.5 * layer.shape.neurons)
        assert selected_columns(layer) == best(scores[path].tolist(), entries), path


def test_the_best_of_the_model_are_selected():
    model = fresh(tiny_vit(), budget=0.05, granularity="model", bias="none")
    scores, total = scores_of(model), Selection.of(model).entries
    Selection.from_scores(model, by_path(scores)).apply(model)
    level = torch.cat([found.flatten() for found in scores.values()]).sort(descending=True).values[total - 1]
    for path, layer in layers_of(model).items():
        expected = [[int(i) for i in (row >= level).nonzero()] for row in scores[path]]
        assert selected_columns(layer) == expected, path


@pytest.mark.parametrize("name", MODELS)
def test_weights_as_scores_select_what_magnitude_selects(name):
    model = fresh(MODELS[name](), per_neuron=2, importance="magnitude")
    own = Selection.from_scores(model, lambda path, weight: weight.abs())
    assert own.modules == Selection.of(model).modules


def test_paths_and_weights_are_the_base_models():
    base, seen = tiny_mlp(), {}
    model = fresh(base, per_neuron=1)
    Selection.from_scores(model, lambda path, weight: seen.setdefault(path, weight).abs())
    plain = tiny_mlp()
    assert seen
    for path, weight in seen.items():
        assert torch.equal(weight, plain.get_submodule(path).weight)
        assert not weight.requires_grad


def test_the_smallest_come_first_with_order_bottom():
    model = fresh(tiny_mlp(), per_neuron=1, order="bottom", importance="magnitude")
    scores = scores_of(model)
    Selection.from_scores(model, by_path(scores)).apply(model)
    for path, layer in layers_of(model).items():
        assert selected_columns(layer) == [[int(row.argmin())] for row in scores[path]]


def test_the_record_says_whose_scores_they_were():
    model = fresh(tiny_mlp(), per_neuron=1)
    selection = Selection.from_scores(model, by_path(scores_of(model)), importance="surprise")
    assert selection.method["importance"] == "surprise"
    assert selection.method["granularity"] == "neuron"
    assert selection.method["base_fingerprint"] == Selection.of(model).method["base_fingerprint"]
    assert "selected by surprise, granularity neuron" in str(selection.apply(model))


def test_double_and_half_precision_are_taken():
    model = fresh(tiny_mlp(), per_neuron=1)
    scores = {path: found.to(torch.bfloat16) for path, found in scores_of(model).items()}
    expected = Selection.from_scores(model, lambda path, weight: scores[path].double())
    assert Selection.from_scores(model, by_path(scores)) == expected


def test_minus_zero_is_zero():
    model = fresh(tiny_mlp(), per_neuron=1)
    scores = {path: torch.zeros_like(found) for path, found in scores_of(model).items()}
    negative = {path: -found for path, found in scores.items()}
    assert Selection.from_scores(model, by_path(negative)) == Selection.from_scores(model, by_path(scores))


def test_norms_need_no_scores():
    model = fresh(tiny_vit(), per_neuron=1, bias="with_norms")
    scores = scores_of(model)
    assert len(scores) < len(layers_of(model))
    assert Selection.from_scores(model, by_path(scores)).modules.keys() == scores.keys()


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (None, TypeError, r"{path}: found scores of type NoneType, expected a floating tensor"),
        ([[1.0]], TypeError, r"{path}: found scores of type list, expected a floating tensor"),
        (torch.ones(3, 3, dtype=torch.int64), TypeError, r"{path}: found scores of type torch.int64, expected"),
        (torch.ones(2, 2), ValueError, r"{path}: found scores of shape \(2, 2\), expected a floating tensor of shape"),
    ],
)
def test_unfit_scores_are_refused(wrong, error, message):
    model = fresh(tiny_mlp(), per_neuron=1)
    scores: dict[str, Any] = scores_of(model)
    last = [*scores][-1]
    scores[last] = wrong
    with unchanged(model), pytest.raises(error, match=message.replace("{path}", last)):
        Selection.from_scores(model, by_path(scores))


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), 1e300])
def test_scores_that_cannot_be_ranked_are_refused(value):
    model = fresh(tiny_mlp(), per_neuron=1)
    scores = {path: found.double() for path, found in scores_of(model).items()}
    scores["first"][1, 2] = value
    with unchanged(model), pytest.raises(ValueError, match="first: found scores that are negative, NaN or infinite"):
        Selection.from_scores(model, by_path(scores))
