"""Losses for gradients that score weights: the loss of the task, and what makes a loss fit for a backward pass."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


Loss = Callable[[Any, Any], Tensor]
"""Takes a model's outputs and the batch. Returns a scalar."""

IGNORED = -100
"""The label that losses of transformers and torch leave out."""
LOSS_REMEDY = "For another kind of task, pass loss=callable to calibrate."


def task_loss(outputs: Any, batch: Any) -> Tensor:
    """Return the loss that the model computed, or else the cross-entropy between its logits and the batch's labels.

    The cross-entropy compares each label with the logits of the same position. Language models shift labels. They get
    the labels as an input, and their outputs hold a loss.

    Args:
        outputs: outputs with an item or attribute `loss` or `logits`. Or the logits, alone or first in a tuple,
            `(batch, classes)` or `(batch, tokens, classes)`.
        batch: a mapping with `labels` (or `label`), or a tuple whose second element is the labels. They are class
            indices, `(batch,)` or `(batch, tokens)`, with -100 where they do not count.

    Raises:
        TypeError: logits or labels are no tensors.
        ValueError: there are no labels, or they do not fit the logits.
    """
    computed: Tensor | None = _entry(outputs, "loss")
    if computed is not None:
        return computed
    logits, labels = _logits(outputs), labels_of(batch)
    integers = not labels.is_floating_point() and not labels.is_complex()
    if logits.dim() not in (2, 3) or labels.shape != logits.shape[:-1] or not integers:
        raise ValueError(
            f"logits are {tuple(logits.shape)} and labels {tuple(labels.shape)} ({labels.dtype}), expected class "
            "indices of shape (batch,) for logits (batch, classes), or (batch, tokens) for (batch, tokens, classes). "
            f"{LOSS_REMEDY}"
        )
    labels = labels.long().to(logits.device)
    classes = logits.shape[-1]
    wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= classes))]
    if len(wrong):
        raise ValueError(f"labels hold {int(wrong[0])}, expected 0 to {classes - 1}, or {IGNORED}. {LOSS_REMEDY}")
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide.flatten(0, -2), labels.flatten(), ignore_index=IGNORED)


def check_loss(value: Any, index: int) -> Tensor:
    """Check that a loss is fit for a backward pass, and return it.

    Args:
        value: what a `Loss` returned.
        index: number of the batch, for errors.

    Raises:
        TypeError: the loss is not a tensor.
        ValueError: the loss is not a scalar, is not finite, or does not require grad.
    """
    where = f"The loss of calibration batch {index}"
    if not isinstance(value, Tensor):
        raise TypeError(f"{where} is of type {type(value).__name__}, expected a scalar tensor.")
    if value.dim():
        raise ValueError(f"{where} is of shape {tuple(value.shape)}, expected a scalar: take its mean.")
    if not bool(torch.isfinite(value)):
        raise ValueError(
            f"{where} is {value.item()}, expected a finite number. Check that batch and its labels, or run the model "
            "in a wider dtype (float32)."
        )
    if not value.requires_grad:
        raise ValueError(
            f"{where} does not require grad, expected one that depends on the model's weights. Do not compute it "
            "under torch.no_grad() or from detached outputs."
        )
    return value


def labels_of(batch: Any) -> Tensor:
    """Return the labels of a batch.

    Raises:
        TypeError: the labels are no tensor.
        ValueError: there are no labels.
    """
    labels = None
    if isinstance(batch, Mapping):
        labels = batch["labels"] if "labels" in batch else batch.get("label")
    elif isinstance(batch, (tuple, list)) and len(batch) > 1:
        labels = batch[1]
    if labels is None:
        raise ValueError(
            f"the batch {contents_of(batch)} and no labels, expected an entry 'labels' or 'label', or a tuple whose "
            f"second element they are. {LOSS_REMEDY}"
        )
    if not isinstance(labels, Tensor):
        raise TypeError(f"the batch's labels are of type {type(labels).__name__}, expected a tensor. {LOSS_REMEDY}")
    return labels


def contents_of(batch: Any) -> str:
    """Return words for an error on what a batch consists of."""
    if isinstance(batch, Mapping):
        return f"holds {', '.join(map(repr, batch)) or 'nothing'}"
    return f"is a {type(batch).__name__}" + (f" of {len(batch)}" if isinstance(batch, (tuple, list)) else "")


def _entry(holder: Any, name: str) -> Any:
    """Return an item of a mapping, or an attribute of anything else. None if it does not exist."""
    return holder.get(name) if isinstance(holder, Mapping) else getattr(holder, name, None)


def _logits(outputs: Any) -> Tensor:
    """Return the logits of a model's outputs.

    Raises:
        TypeError: the outputs have no logits that are a tensor.
    """
    logits = _entry(outputs, "logits")
    if logits is None:
        logits = outputs[0] if isinstance(outputs, (tuple, list)) and outputs else outputs
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"the model's outputs are of type {type(outputs).__name__} without loss or logits, expected one of them, "
            f"or a tensor. {LOSS_REMEDY}"
        )
    return logits
