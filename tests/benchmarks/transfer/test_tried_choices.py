import pytest
import torch

from peft_fps import Selection
from peft_fps.benchmarks.transfer.tried_choices import CHOICES, choose
from peft_fps.benchmarks.transfer.typical_sizes import gather_sizes
from tests.selection import naive
from tests.support.helpers import adapted, fill, images, layers_of, selected_columns, tiny_vit, unchanged


UNEVEN = ("owl", "alpha")


def labelled_images() -> list[dict[str, torch.Tensor]]:
    return [{"pixel_values": images(4, seed=seed), "labels": torch.arange(4) % 3} for seed in range(2)]


def built():
    return adapted(tiny_vit(), filled=False, budget=0.06, bias="all")


def scores_of(choice: str, weight: torch.Tensor, sizes) -> list[list[float]]:
    """By its definition; float64, rounded once as the scores that are ranked."""
    w, a = weight.double(), sizes.mean_input
    left, values, right = torch.linalg.svd(w)
    rank_one = (values[0] * torch.outer(left[:, 0], right[0])).abs()  # 2 % of 32, rounded up
    ria = (w.abs() / w.abs().sum(0) + w.abs() / w.abs().sum(1, keepdim=True)) * sizes.root_mean_square**0.5
    by_gradient = w.abs() * a * sizes.mean_gradient[:, None]
    found = {
        "lift": rank_one,
        "lift-activation": rank_one * a,
        "ria": ria,
        "output-gradient": by_gradient,
        "output-gradient-layer": by_gradient,
    }
    return found.get(choice, w.abs() * a).float().tolist()


@pytest.mark.parametrize("choice", CHOICES)
def test_the_best_by_the_score_are_chosen_and_as_many_as_before(choice):
    model = built()
    before, sizes = Selection.of(model), gather_sizes(model, labelled_images(), backward=True)
    choose(model, choice, labelled_images())
    after = Selection.of(model)
    assert after.entries == before.entries
    assert after.method["importance"] == choice
    numbers = {path: module.entries for path, module in after.modules.items()}
    assert (numbers == {path: module.entries for path, module in before.modules.items()}) == (choice not in UNEVEN)
    differing = 0
    for path, layer in layers_of(model).items():
        scores = scores_of(choice, layer.base_layer.weight.detach().flatten(1), sizes[path])
        found, entries = selected_columns(layer), numbers[path]
        if choice in ("neuron-then-layer", "output-gradient") and entries > len(scores):
            assert all(row.index(max(row)) in columns for row, columns in zip(scores, found, strict=True))
            continue
        best = naive.by_layer if choice == "output-gradient-layer" else naive.by_neuron
        pairs = zip(found, best(scores, entries), strict=True)
        differing += sum(len(set(columns) ^ set(expected)) for columns, expected in pairs)
    assert differing <= after.entries // 100  # scores that differ in the last bit of float32


@pytest.mark.parametrize("choice", UNEVEN)
def test_choosing_again_spreads_the_same_total(choice):
    model = built()
    choose(model, choice, labelled_images()[:1])
    choose(model, choice, labelled_images())
    once = built()
    choose(once, choice, labelled_images())
    assert Selection.of(model) == Selection.of(once)


def test_a_trained_adapter_is_refused():
    model = built()
    fill(model)
    with unchanged(model), pytest.raises(ValueError, match="holds trained changes"):
        choose(model, "owl", labelled_images())
