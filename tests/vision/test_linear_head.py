import pytest
import torch

from peft_fps.vision.linear_head import STRENGTHS, fit_linear_head


def clouds(count, seed, noise):
    """Two Gaussian clouds at +1 and -1 of the first of 20 coordinates."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    points = torch.randn(count, 20, generator=generator) * noise
    points[:, 0] += labels * 2 - 1
    return points, labels


def test_separable_classes_are_learned():
    head = fit_linear_head(clouds(400, 0, 0.1), clouds(40, 1, 0.1))
    assert head.accuracy(*clouds(100, 2, 0.1)) == 1.0
    points, labels = clouds(100, 3, 0.1)
    assert head.accuracy(points, 1 - labels) == 0.0


def test_the_strength_is_the_best_on_validation_and_the_smallest_of_equals():
    head = fit_linear_head(clouds(40, 0, 1.5), clouds(200, 1, 1.5))
    assert set(head.validation) == set(STRENGTHS)
    best = max(head.validation.values())
    assert min(head.validation.values()) < best
    assert head.strength == min(c for c, score in head.validation.items() if score == best)
    assert head.accuracy(*clouds(200, 1, 1.5)) == pytest.approx(best)


@pytest.mark.parametrize("classes", [2, 3])
def test_as_a_layer_it_predicts_the_same(classes):
    points = torch.randn(60, 5, generator=torch.Generator().manual_seed(classes))
    labels = points[:, :classes].argmax(-1)
    head = fit_linear_head((points[:40] * 3 + 1, labels[:40]), (points[40:] * 3 + 1, labels[40:]))
    weight, bias = head.as_layer()
    assert (weight.shape, bias.shape) == ((classes, 5), (classes,))
    found = torch.nn.functional.linear(points * 3 + 1, weight, bias).softmax(-1)
    expected = torch.from_numpy(head.classifier.predict_proba((points * 3 + 1).numpy())).float()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
