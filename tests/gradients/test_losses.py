"""The task's loss and its check, against loops and models that compute their own."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForTokenClassification

from peft_fps.gradients.losses import check_loss, task_loss
from tests.support.helpers import images, normal, tiny_bert, tiny_gpt2, tiny_mlp, tiny_vit, tokens


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
