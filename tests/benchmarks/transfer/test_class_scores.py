"""Scores from forward passes and labels, against numpy over all batches at once."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from peft_fps import Selection
from peft_fps.benchmarks.transfer.class_scores import SCORES, Moments, as_tokens, gather_moments, select_by
from tests.selection import naive
from tests.support.helpers import adapted, layers_of, normal, selected_columns, tiny_mlp, tiny_vit, unchanged


CLASSES = 4


def deviation(values: np.ndarray) -> np.ndarray:
    """Over the first axis."""
    return np.sqrt(((values - values.mean(0)) ** 2).mean(0))


class Reference:
    """Everything by its definition, from inputs `(images, tokens, inputs)` and outputs of all images."""

    def __init__(self, x: np.ndarray, y: np.ndarray, labels: np.ndarray) -> None:
        images, outputs = x.mean(1), y.mean(1)
        seen = sorted(set(labels.tolist()))
        by_class = np.stack([images[labels == label].mean(0) for label in seen])
        out_by_class = np.stack([outputs[labels == label].mean(0) for label in seen])
        self.class_inputs = by_class - by_class.mean(0)
        self.class_outputs = out_by_class - out_by_class.mean(0)
        self.of_classes = deviation(by_class)
        self.of_tokens = deviation(x.reshape(-1, x.shape[-1]))
        self.of_outputs = deviation(out_by_class)
        self.covariance = np.zeros((y.shape[-1], x.shape[-1]))
        for x_class, y_class in zip(self.class_inputs, self.class_outputs, strict=True):
            self.covariance += np.outer(y_class, x_class) / len(seen)

    def score(self, name: str, weight: np.ndarray) -> np.ndarray:
        found = np.zeros_like(weight)
        for neuron, inputs in np.ndindex(*weight.shape):
            w, covariance = abs(weight[neuron, inputs]), abs(self.covariance[neuron, inputs])
            found[neuron, inputs] = {
                "class-spread": w * self.of_classes[inputs],
                "token-spread": w * self.of_tokens[inputs],
                "class-covariance": covariance,
                "weighted-covariance": w * covariance,
                "output-spread": w * self.of_classes[inputs] * self.of_outputs[neuron],
            }[name]
        return found


def batches_of(labels: list[list[int]], tokens: int, inputs: int, neurons: int, seed: int = 0):
    """Inputs, outputs and labels of each batch; they differ by class and have a mean."""
    found = []
    for number, batch in enumerate(labels):
        of_batch = torch.tensor(batch)
        x = normal(len(batch), tokens, inputs, seed=seed + 2 * number) + of_batch[:, None, None] * 0.5 + 3
        y = normal(len(batch), tokens, neurons, seed=seed + 2 * number + 1) - of_batch[:, None, None]
        found.append((x, y, of_batch))
    return found


def gathered(batches) -> tuple[Moments, Reference]:
    moments = Moments.empty(CLASSES, batches[0][0].shape[-1], batches[0][1].shape[-1])
    for batch in batches:
        moments.add(*batch)
    x, y, labels = (torch.cat(parts).double().numpy() for parts in zip(*batches, strict=True))
    return moments, Reference(x, y, labels)


LABELS = st.lists(st.lists(st.integers(0, CLASSES - 1), min_size=1, max_size=4), min_size=1, max_size=4)


@given(LABELS, st.integers(1, 3), st.integers(0, 50))
def test_moments_are_those_of_all_batches_together(labels, tokens, seed):
    moments, expected = gathered(batches_of(labels, tokens, inputs=3, neurons=2, seed=100 * seed))
    flat = [label for batch in labels for label in batch]
    assert moments.counts.tolist() == [flat.count(label) for label in range(CLASSES)]
    assert moments.tokens == len(flat) * tokens
    found = {
        "class_inputs": moments.class_inputs,
        "class_outputs": moments.class_outputs,
        "of_classes": moments.spread_of_classes(),
        "of_tokens": moments.spread_of_tokens(),
    }
    for name, value in found.items():
        # a difference of squares leaves about the root of the rounding error where nothing varies
        np.testing.assert_allclose(value.numpy(), getattr(expected, name), rtol=1e-9, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("score", SCORES)
def test_scores_are_what_their_names_say(score):
    moments, expected = gathered(batches_of([[0, 1, 3], [1, 1, 0, 3], [3]], tokens=5, inputs=4, neurons=3))
    weight = normal(3, 4, seed=9).double()
    found = SCORES[score](weight, moments)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), expected.score(score, weight.numpy()), rtol=1e-9)


@pytest.mark.parametrize("score", SCORES)
def test_inputs_that_never_vary_score_nothing(score):
    batches = [(torch.full_like(x, 2.5), torch.ones_like(y), labels) for x, y, labels in batches_of([[0, 1]], 2, 3, 2)]
    found = SCORES[score](normal(2, 3).double(), gathered(batches)[0])
    assert torch.equal(found, torch.zeros(2, 3, dtype=torch.float64))


@pytest.mark.parametrize(("shape", "tokens"), [((4, 3), 1), ((4, 5, 3), 5), ((4, 2, 6, 3), 12)])
def test_tokens_of_a_linear_layer(shape, tokens):
    layer, x = nn.Linear(3, 2), normal(*shape)
    found_x, found_y = as_tokens(layer, x, layer(x))
    assert (found_x.shape, found_y.shape) == ((4, tokens, 3), (4, tokens, 2))
    assert torch.equal(found_x, x.reshape(4, tokens, 3))
    torch.testing.assert_close(found_y, found_x @ layer.weight.t() + layer.bias)


@pytest.mark.parametrize(
    "options",
    [{"kernel_size": 4, "stride": 4}, {"kernel_size": (3, 2), "padding": (1, 0)}, {"kernel_size": 2, "dilation": 2}],
    ids=["patches", "padded", "dilated"],
)
def test_tokens_of_a_convolution_are_its_patches(options):
    layer, x = nn.Conv2d(3, 5, **options), normal(2, 3, 8, 8)
    output = layer(x)
    patches, found = as_tokens(layer, x, output)
    assert found.shape == (2, output.shape[2] * output.shape[3], 5)
    assert torch.equal(found.reshape(2, *output.shape[2:], 5).permute(0, 3, 1, 2), output)
    torch.testing.assert_close(patches @ layer.weight.flatten(1).t() + layer.bias, found)


def labelled_images(count: int = 3) -> list[dict[str, torch.Tensor]]:
    found = []
    for number in range(count):
        labels = torch.tensor([0, 1, 2, number])
        pixels = normal(4, 3, 16, 16, seed=number) + labels[:, None, None, None]
        found.append({"pixel_values": pixels, "labels": labels})
    return found


def references(base: nn.Module, paths, data) -> dict[str, Reference]:
    """From the plain model, all images in one batch."""
    seen = {}
    for path in paths:
        hook = base.get_submodule(path).register_forward_hook
        hook(lambda module, args, output, path=path: seen.update({path: as_tokens(module, args[0], output)}))
    with torch.no_grad():
        base.eval()(pixel_values=torch.cat([batch["pixel_values"] for batch in data]))
    labels = torch.cat([batch["labels"] for batch in data]).numpy()
    return {path: Reference(*(part.double().numpy() for part in seen[path]), labels) for path in paths}


@pytest.mark.parametrize("training", [True, False])
def test_gathering_leaves_the_model_as_it_was(training):
    model = adapted(tiny_vit(), filled=False).train(training)
    with unchanged(model):
        found = gather_moments(model, labelled_images(), CLASSES)
    assert found.keys() == layers_of(model).keys()


def test_gathering_that_fails_leaves_no_hooks():
    model = adapted(tiny_vit(), filled=False).train()
    data = [*labelled_images(1), {"pixel_values": torch.zeros(1, 3, 8, 8), "labels": torch.tensor([0])}]
    with unchanged(model), pytest.raises(ValueError, match="Input image size"):
        gather_moments(model, data, CLASSES)


def test_moments_of_a_model_are_those_of_the_plain_model():
    model, data = adapted(tiny_vit(), filled=False), labelled_images()
    found = gather_moments(model, data, CLASSES)
    for path, expected in references(tiny_vit(), found, data).items():
        np.testing.assert_allclose(found[path].class_inputs, expected.class_inputs, atol=1e-5, err_msg=path)
        np.testing.assert_allclose(found[path].spread_of_tokens(), expected.of_tokens, atol=1e-5, err_msg=path)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("granularity", ["neuron", "layer"])
def test_the_best_entries_are_selected_and_as_many_as_before(score, granularity):
    model = adapted(tiny_vit(), filled=False, budget=0.03, granularity=granularity, bias="none")
    data = labelled_images()
    before = Selection.of(model)
    select_by(model, score, data, CLASSES)
    after = Selection.of(model)
    assert after.method["importance"] == score
    moments = gather_moments(model, data, CLASSES)
    for path, layer in layers_of(model).items():
        assert after.modules[path].entries == before.modules[path].entries
        weight = layer.base_layer.weight.detach().flatten(1)
        scores = SCORES[score](weight.double(), moments[path]).float().tolist()
        best = naive.by_neuron if granularity == "neuron" else naive.by_layer
        assert selected_columns(layer) == best(scores, before.modules[path].entries), path


def test_what_is_selected_is_best_by_the_formula():
    """Without any of the module's own arithmetic; scores are far apart, so that rounding decides nothing."""
    model, data = adapted(tiny_vit(), filled=False, per_neuron=2), labelled_images()
    select_by(model, "class-spread", data, CLASSES)
    for path, expected in references(tiny_vit(), layers_of(model), data).items():
        layer = layers_of(model)[path]
        scores = expected.score("class-spread", layer.base_layer.weight.detach().double().flatten(1).numpy())
        for row, columns in zip(scores, selected_columns(layer), strict=True):
            assert len(columns) == 2
            left = np.delete(row, columns)
            assert row[columns].min() >= left.max() - 1e-5


def test_a_trained_adapter_is_refused():
    model = adapted(tiny_vit())
    with unchanged(model), pytest.raises(ValueError, match="holds trained changes"):
        select_by(model, "class-spread", labelled_images(), CLASSES)


def test_models_that_are_no_vision_models_need_no_patches():
    model = adapted(tiny_mlp(), filled=False, target_modules=["first"])
    data = [{"x": normal(6, 10, seed=seed), "labels": torch.arange(6) % CLASSES} for seed in range(2)]
    found = gather_moments(model, data, CLASSES)["first"]
    images = torch.cat([batch["x"] for batch in data]).double().numpy()
    np.testing.assert_allclose(found.spread_of_tokens(), deviation(images), rtol=1e-6)
