"""Losses against loops, autograd and models that compute their own."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import BertConfig, BertForTokenClassification

from peft_fps.benchmarks.cost.random_models import copy_model
from peft_fps.gradients.losses import check_loss, contrastive_step, supervised_contrastive, task_loss
from tests.helpers import images, normal, tiny_bert, tiny_conv, tiny_gpt2, tiny_mlp, tiny_vit, tokens


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


# --- the task's loss ------------------------------------------------------------------------------------------------


def naive_cross_entropy(logits: Tensor, labels: Tensor) -> float:
    """Mean over the labels that are not -100."""
    losses = []
    for scores, label in zip(logits.double().flatten(0, -2).tolist(), labels.flatten().tolist(), strict=True):
        if label != -100:
            losses.append(math.log(sum(math.exp(score) for score in scores)) - scores[label])
    return sum(losses) / len(losses)


def classified(model: nn.Module, **inputs: Tensor) -> tuple[Any, Any]:
    return model(**inputs), inputs


@pytest.mark.parametrize(
    ("outputs", "batch"),
    [
        classified(tiny_vit(), pixel_values=images(), labels=torch.tensor([0, 1, 4, 2])),
        classified(tiny_bert(), input_ids=tokens(), labels=torch.tensor([0, 1, 2, 2])),
        classified(tiny_gpt2(), input_ids=tokens(), labels=tokens()),
        (SimpleNamespace(loss=torch.tensor(3.5), logits=None), {}),
        ({"loss": torch.tensor(3.5)}, (images(), None)),
    ],
    ids=["vit", "bert", "gpt2", "attribute", "mapping"],
)
def test_the_models_own_loss_comes_first(outputs: Any, batch: Any):
    own = outputs["loss"] if isinstance(outputs, dict) else outputs.loss
    assert own is not None
    assert task_loss(outputs, batch) is own


@pytest.mark.parametrize("key", ["labels", "label"])
@pytest.mark.parametrize("build", [tiny_vit, tiny_bert], ids=["vit", "bert"])
def test_without_a_loss_of_its_own_it_is_what_the_model_would_compute(build: Callable[[], Any], key: str):
    model, labels = build(), torch.tensor([0, 2, 1, 2])
    inputs = {"pixel_values": images()} if build is tiny_vit else {"input_ids": tokens()}
    found = task_loss(model(**inputs), {**inputs, key: labels})
    torch.testing.assert_close(found, model(**inputs, labels=labels).loss)


def test_the_entry_labels_comes_before_label():
    logits, labels = normal(2, 3), torch.tensor([0, 2])
    found = task_loss(logits, {"label": 1 - labels, "labels": labels})
    assert found.item() == pytest.approx(naive_cross_entropy(logits, labels))


@pytest.mark.parametrize(
    "wrap", [lambda y: y, lambda y: (y, "more"), lambda y: [y], lambda y: {"logits": y, "loss": None}]
)
@pytest.mark.parametrize("batch", [tuple, list], ids=["tuple", "list"])
def test_plain_models_and_batches_without_names(wrap: Callable[[Tensor], Any], batch: Callable[[Any], Any]):
    model, x, labels = tiny_mlp(), normal(5, 10), torch.tensor([3, 0, 1, 1, 2])
    loss = task_loss(wrap(model(x)), batch([x, labels]))
    assert loss.item() == pytest.approx(naive_cross_entropy(model(x), labels))
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_labels_of_tokens_leave_out_those_that_do_not_count():
    config = BertConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=3
    )
    model = BertForTokenClassification(config).eval()
    ids, labels = tokens(), torch.randint(3, (4, 9), generator=torch.Generator().manual_seed(1))
    labels[:, 5:] = -100
    outputs = model(input_ids=ids)
    found = task_loss(outputs, {"input_ids": ids, "labels": labels})
    assert found.item() == pytest.approx(naive_cross_entropy(outputs.logits, labels), rel=1e-5)
    torch.testing.assert_close(found, model(input_ids=ids, labels=labels).loss)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_narrow_logits_and_labels(dtype: torch.dtype, kind: torch.dtype):
    logits, labels = (10 * normal(4, 3)).to(dtype), torch.tensor([0, 1, 2, 2], dtype=kind)
    found = task_loss(logits, (None, labels))
    assert found.dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert found.item() == pytest.approx(naive_cross_entropy(logits, labels), rel=1e-5)


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ({"pixel_values": 0}, "holds 'pixel_values' and no labels"),
        ({}, "holds nothing and no labels"),
        ({"labels": None}, "holds 'labels' and no labels"),
        ((torch.ones(2),), "is a tuple of 1 and no labels"),
        ([torch.ones(2), None], "is a list of 2 and no labels"),
        (torch.ones(2), "is a Tensor and no labels"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_batch_without_labels_is_refused(batch: Any, said: str):
    with pytest.raises(ValueError, match=r"expected an entry 'labels'.*pass loss=callable to calibrate") as error:
        task_loss(torch.ones(2, 3), batch)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("logits", "labels"),
    [
        (torch.ones(2, 3), torch.zeros(3, dtype=torch.int64)),
        (torch.ones(2, 3), torch.zeros(2, 1, dtype=torch.int64)),
        (torch.ones(2, 3), torch.zeros(2)),
        (torch.ones(2, 3), torch.zeros(2, 3)),
        (torch.ones(2, 4, 3), torch.zeros(2, dtype=torch.int64)),
        (torch.ones(3), torch.zeros((), dtype=torch.int64)),
        (torch.ones(2, 3, 4, 4), torch.zeros(2, 3, 4, dtype=torch.int64)),
    ],
    ids=["count", "column", "regression", "soft", "tokens", "no-batch", "space"],
)
def test_labels_that_do_not_fit_the_logits_are_refused(logits: Tensor, labels: Tensor):
    with pytest.raises(ValueError, match=r"expected class indices of shape \(batch,\).*pass loss=callable") as error:
        task_loss({"logits": logits}, {"labels": labels})
    assert f"logits are {tuple(logits.shape)} and labels {tuple(labels.shape)} ({labels.dtype})" in str(error.value)


@pytest.mark.parametrize("label", [3, -1, -101, 255])
def test_a_label_that_is_no_class_is_refused(label: int):
    with pytest.raises(ValueError, match=rf"labels hold {label}, expected 0 to 2, or -100\. .*pass loss=callable"):
        task_loss(torch.ones(3, 3), {"labels": torch.tensor([0, label, -100])})


def test_labels_or_logits_that_are_no_tensors_are_refused():
    with pytest.raises(TypeError, match=r"labels are of type list, expected a tensor.*pass loss=callable"):
        task_loss(torch.ones(2, 3), {"labels": [0, 1]})
    for outputs in ({"features": torch.ones(2)}, "text", (), (None,), None):
        with pytest.raises(TypeError, match=rf"of type {type(outputs).__name__} without loss or logits"):
            task_loss(outputs, {"labels": torch.tensor([0, 1])})


# --- whether a loss is fit for a backward pass ----------------------------------------------------------------------


def test_a_fit_loss_is_returned():
    loss = normal(3).requires_grad_().sum()
    assert check_loss(loss, 0) is loss


@pytest.mark.parametrize(
    ("value", "kind", "said"),
    [
        (1.5, TypeError, "is of type float, expected a scalar tensor"),
        (None, TypeError, "is of type NoneType, expected a scalar tensor"),
        (torch.ones(2, requires_grad=True), ValueError, "is of shape (2,), expected a scalar"),
        (torch.ones(1, requires_grad=True), ValueError, "is of shape (1,), expected a scalar"),
        (torch.tensor(math.nan, requires_grad=True), ValueError, "is nan, expected a finite number"),
        (torch.tensor(-math.inf, requires_grad=True), ValueError, "is -inf, expected a finite number"),
        (torch.tensor(1.0), ValueError, "does not require grad"),
        (torch.tensor(1), ValueError, "does not require grad"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_loss_that_is_not_fit_is_refused_with_its_batch(value: Any, kind: type[Exception], said: str):
    with pytest.raises(kind, match=r"^The loss of calibration batch 17 ") as error:
        check_loss(value, 17)
    assert said in str(error.value)


def test_a_batch_in_which_no_label_counts_is_found():
    loss = task_loss(torch.ones(2, 3, requires_grad=True), {"labels": torch.tensor([-100, -100])})
    with pytest.raises(ValueError, match=r"batch 4 is nan.*its labels"):
        check_loss(loss, 4)


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
