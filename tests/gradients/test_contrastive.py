"""The supervised contrastive loss against loops, autograd and the features of models."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from peft_fps.benchmarks.cost.random_models import copy_model
from peft_fps.gradients.contrastive import contrastive_step, supervised_contrastive
from tests.support.helpers import images, normal, tiny_conv, tiny_vit


# --- supervised contrastive -----------------------------------------------------------------------------------------


def naive_contrastive(features: Tensor, labels: list[int], temperature: float) -> float:
    """Equation 2, anchor by anchor; -1 if there is no anchor."""
    rows = features.double().tolist()
    unit = [[value / math.hypot(*row) for value in row] for row in rows]
    cosine = [[sum(a * b for a, b in zip(one, other, strict=True)) for other in unit] for one in unit]
    losses = []
    for i in range(len(labels)):
        others = [j for j in range(len(labels)) if j != i]
        positive = [j for j in others if labels[j] == labels[i]]
        if positive:
            total = sum(math.exp(cosine[i][j] / temperature) for j in others)
            losses.append(
                -sum(math.log(math.exp(cosine[i][j] / temperature) / total) for j in positive) / len(positive)
            )
    return sum(losses) / len(losses) if losses else -1.0


label_patterns = st.lists(st.integers(0, 4), min_size=2, max_size=9).filter(
    lambda labels: len(set(labels)) < len(labels)
)


@given(label_patterns, st.integers(1, 5), st.sampled_from([0.07, 0.5, 2.0]), st.integers(0, 1000))
def test_contrastive_loss_against_its_definition(labels: list[int], size: int, temperature: float, seed: int):
    features = normal(len(labels), size, seed=seed, dtype=torch.float64)
    found = supervised_contrastive(features, torch.tensor(labels), temperature)
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(naive_contrastive(features, labels, temperature), rel=1e-9, abs=1e-9)


def test_the_default_temperature_is_that_of_the_paper():
    features, labels = normal(4, 3, dtype=torch.float64), [0, 1, 0, 1]
    found = supervised_contrastive(features, torch.tensor(labels))
    assert found.item() == pytest.approx(naive_contrastive(features, labels, 0.07))


@given(label_patterns, st.integers(0, 1000), st.randoms(use_true_random=False))
def test_the_order_of_views_and_the_names_of_labels_do_not_matter(labels: list[int], seed: int, random: Any):
    features = normal(len(labels), 4, seed=seed, dtype=torch.float64)
    order = list(range(len(labels)))
    random.shuffle(order)
    renamed = torch.tensor([7 - 3 * labels[i] for i in order])
    expected = supervised_contrastive(features, torch.tensor(labels))
    torch.testing.assert_close(supervised_contrastive(features[order], renamed), expected)


@pytest.mark.parametrize("labels", [[0, 0, 1, 1], [0, 0, 0, 1], [2, 2, 2, 2], [0, 1, 2, 0]], ids=str)
def test_contrastive_gradients(labels: list[int]):
    features = normal(4, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: supervised_contrastive(x, torch.tensor(labels), 0.5), features)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_narrow_features_are_widened_first(dtype: torch.dtype, autocast: bool):
    features, labels = (100 * normal(6, 8)).to(dtype).requires_grad_(), [0, 1, 2, 0, 1, 2]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = supervised_contrastive(features, torch.tensor(labels))
    found.backward()
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(naive_contrastive(features.detach(), labels, 0.07), rel=1e-5)
    assert features.grad.dtype == dtype
    assert bool(features.grad.isfinite().all())


@pytest.mark.parametrize("temperature", [1e-4, 1e-2, 0.07])
def test_sharp_temperatures_and_long_or_equal_features_stay_finite(temperature: float):
    same = torch.ones(3, 4)
    features = torch.cat([same, -1e6 * same, torch.zeros(2, 4)]).requires_grad_()
    loss = supervised_contrastive(features, torch.tensor([0, 1, 0, 1, 0, 1, 0, 5]), temperature)
    loss.backward()
    assert bool(loss.isfinite())
    assert bool(features.grad.isfinite().all())


def test_an_anchor_without_a_positive_is_a_negative_still():
    features = normal(3, 4).requires_grad_()
    loss = supervised_contrastive(features, torch.tensor([0, 0, 1]))
    loss.backward()
    assert loss.item() == pytest.approx(naive_contrastive(features.detach(), [0, 0, 1], 0.07), rel=1e-5)
    assert bool((features.grad != 0).any(1).all())


@pytest.mark.parametrize("labels", [[], [3], [0, 1, 2]], ids=str)
def test_views_without_any_positive_are_refused(labels: list[int]):
    with pytest.raises(ValueError, match=rf"none of {len(labels)} views .* at least two views of one label"):
        supervised_contrastive(torch.ones(len(labels), 4), torch.tensor(labels))


@pytest.mark.parametrize(
    ("features", "labels"),
    [((4,), (4,)), ((4, 2, 3), (4,)), ((4, 3), (3,)), ((4, 3), (4, 1)), ((4, 3), ())],
    ids=str,
)
def test_contrastive_shapes_that_do_not_fit_are_refused(features: tuple[int, ...], labels: tuple[int, ...]):
    with pytest.raises(ValueError, match=r"expected \(views, size\) and \(views,\)") as error:
        supervised_contrastive(torch.ones(features), torch.zeros(labels))
    assert f"features are {features} and labels {labels}" in str(error.value)


@pytest.mark.parametrize("temperature", [0, -1.0, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float):
    with pytest.raises(ValueError, match=rf"temperature is {temperature}, expected a positive"):
        supervised_contrastive(torch.ones(2, 3), torch.zeros(2), temperature)


# --- the contrastive step -------------------------------------------------------------------------------------------


LABELS = torch.tensor([0, 1, 0, 2])


def mirrored(x: Tensor) -> Tensor:
    return torch.cat([x, x.flip(-1)])


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


class Head(nn.Module):
    """Reads features of any shape, by name if `named`."""

    def forward(self, features: Any) -> Any:
        return features


class Featured(nn.Module):
    """Gives its images, reshaped, to its head."""

    def __init__(self, reshape: Callable[[Tensor], Any], named: bool = False, calls: int = 1) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.head = Head()
        self.reshape, self.named, self.calls = reshape, named, calls

    def forward(self, x: Tensor) -> None:
        for call in range(self.calls):
            features = self.reshape(x * self.scale + call)
            self.head(features=features) if self.named else self.head(features)


@pytest.mark.parametrize(
    "batch",
    [
        {"pixel_values": images(), "labels": LABELS},
        {"pixel_values": images(), "label": LABELS, "unknown": 3},
        ({"pixel_values": images()}, LABELS),
        (images(), LABELS),
        [images(), LABELS],
    ],
    ids=["mapping", "label", "mapping-and-labels", "tuple", "list"],
)
def test_contrastive_step_on_a_vit(batch: Any):
    model, plain = tiny_vit(), copy_model(tiny_vit())
    loss = contrastive_step(model, "classifier", batch, mirrored)
    loss.backward()

    hidden = plain.vit(pixel_values=mirrored(images())).last_hidden_state[:, 0]
    expected = 0.0
    unit = hidden / hidden.norm(dim=1, keepdim=True)
    labels = LABELS.tolist() * 2
    anchors = range(8)
    for i in anchors:
        others = [j for j in anchors if j != i]
        positive = [j for j in others if labels[j] == labels[i]]
        total = torch.stack([(unit[i] @ unit[j] / 0.07).exp() for j in others]).sum()
        expected = expected - sum((unit[i] @ unit[j] / 0.07) - total.log() for j in positive) / len(positive) / 8
    torch.testing.assert_close(loss, expected)
    expected.backward()
    for (name, found), (_, wanted) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        if name.startswith("classifier"):
            assert found.grad is None
            assert wanted.grad is None
        else:
            torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-3, atol=1e-5, msg=name)
    assert hooks(model) == 0


def test_the_temperature_of_a_contrastive_step():
    model = Featured(lambda x: x.flatten(1))
    loss = contrastive_step(model, "head", (images(), LABELS), mirrored, temperature=0.5)
    features = mirrored(images()).flatten(1)
    assert loss.item() == pytest.approx(naive_contrastive(features, LABELS.tolist() * 2, 0.5), rel=1e-5)


@pytest.mark.parametrize(
    ("reshape", "pooled"),
    [
        (lambda x: x.flatten(1), lambda x: x.flatten(1)),
        (lambda x: x.flatten(2), lambda x: x[:, 0].flatten(1)),
        (lambda x: x, lambda x: torch.stack([x[:, c].flatten(1).mean(1) for c in range(3)], 1)),
    ],
    ids=["flat", "tokens", "space"],
)
@pytest.mark.parametrize("named", [False, True], ids=["positional", "named"])
def test_what_of_the_heads_input_are_its_features(
    reshape: Callable[[Tensor], Tensor], pooled: Callable[[Tensor], Tensor], named: bool
):
    model = Featured(reshape, named, calls=2)
    loss = contrastive_step(model, "head", (images(), LABELS), mirrored)
    features = pooled(mirrored(images()))
    assert loss.item() == pytest.approx(naive_contrastive(features, LABELS.tolist() * 2, 0.07), rel=1e-4)


def test_contrastive_step_on_convolutions():
    model = tiny_conv()
    loss = contrastive_step(model, "head", (images(), LABELS), mirrored)
    loss.backward()
    assert model.head.weight.grad is None
    assert bool((model.stem.weight.grad != 0).all())


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (Featured(lambda x: x.flatten()), r"head: its input is \(6144,\), expected features"),
        (Featured(lambda x: x[..., None]), r"head: its input is \(8, 3, 16, 16, 1\), expected features"),
        (Featured(lambda x: "text"), r"head: its input is str, expected features"),
        (Featured(lambda x: x, calls=0), r"head: not called when the model ran"),
    ],
    ids=["no-batch", "video", "text", "not-called"],
)
def test_a_head_without_features_is_refused(model: Featured, said: str):
    with pytest.raises(ValueError, match=said + r".*pass loss=callable"):
        contrastive_step(model, "head", (images(), LABELS), mirrored)
    assert hooks(model) == 0


def test_the_hook_is_removed_if_the_model_fails():
    model = tiny_vit()
    with pytest.raises(ValueError, match="doesn't match"):  # transformers' words
        contrastive_step(model, "classifier", (images()[..., :8], LABELS), mirrored)
    assert hooks(model) == 0


@pytest.mark.parametrize("head", ["", "head", "classifier.weight"])
def test_a_head_that_the_model_does_not_have_is_refused(head: str):
    with pytest.raises(ValueError, match=rf"ViTForImageClassification has no module '{head}'"):
        contrastive_step(tiny_vit(), head, (images(), LABELS), mirrored)


@pytest.mark.parametrize(
    ("batch", "kind", "said"),
    [
        ({"pixel_values": images()}, ValueError, "holds 'pixel_values' and no labels"),
        ((images(),), ValueError, "is a tuple of 1 and no labels"),
        ({"labels": LABELS}, ValueError, "holds 'labels', expected images as 'pixel_values'"),
        (({"x": images()}, LABELS), ValueError, "holds 'x', expected images as 'pixel_values'"),
        ({"pixel_values": [1], "labels": LABELS}, TypeError, "images are of type list, expected a tensor"),
        (("text", LABELS), TypeError, "images are of type str, expected a tensor"),
        ((images(), LABELS[:3]), ValueError, "labels are (3,), expected one for each of 4 images"),
        ((images(), LABELS[:, None]), ValueError, "labels are (4, 1), expected one for each of 4 images"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_batches_without_images_or_labels_are_refused(batch: Any, kind: type[Exception], said: str):
    with pytest.raises(kind) as error:
        contrastive_step(tiny_vit(), "classifier", batch, mirrored)
    assert said in str(error.value)


def test_another_number_of_views_is_refused():
    with pytest.raises(ValueError, match="views made 4 images of 4, expected two of each"):
        contrastive_step(tiny_vit(), "classifier", (images(), LABELS), lambda x: x)


def test_switches_in_the_batch_reach_the_model():
    model, labels = tiny_vit(), torch.tensor([0, 1, 0])
    larger = normal(3, 3, 32, 32)
    batch = {"pixel_values": larger, "labels": labels, "interpolate_pos_encoding": True}
    both = mirrored(larger)
    features = model.vit(both, interpolate_pos_encoding=True).last_hidden_state[:, 0]
    expected = supervised_contrastive(features, labels.repeat(2))
    torch.testing.assert_close(contrastive_step(model, "classifier", batch, mirrored), expected)
    with pytest.raises(ValueError, match="32"):
        contrastive_step(model, "classifier", batch | {"interpolate_pos_encoding": False}, mirrored)
