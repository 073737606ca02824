"""The supervised contrastive loss of a model's features, by which GPS selects."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_fps.calibration.batches import inputs_of
from peft_fps.gradients.losses import LOSS_REMEDY, contents_of, labels_of


TEMPERATURE = 0.07


def supervised_contrastive(features: Tensor, labels: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Return the supervised contrastive loss (Khosla et al. 2020, arXiv 2004.11362, eq. 2).

    Every view is an anchor, and the other views with its label are its positives. An anchor without a positive does
    not count in the mean, but is a negative of the other anchors. GPS (arXiv 2312.10136) selects by this loss.

    Args:
        features: one vector per view, `(views, size)`. The function scales them to length 1.
        labels: class of each view, `(views,)`.
        temperature: number that divides the cosines. Default: 0.07.

    Returns:
        A scalar in float32, or in float64 for float64 features, under autocast too.

    Raises:
        ValueError: shapes do not fit, the temperature is not positive, or no label occurs twice.
    """
    if features.dim() != 2 or labels.shape != features.shape[:1]:
        raise ValueError(
            f"features are {tuple(features.shape)} and labels {tuple(labels.shape)}, expected (views, size) and "
            "(views,)."
        )
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, expected a positive number.")
    labels = labels.to(features.device)
    itself = torch.eye(len(labels), dtype=torch.bool, device=features.device)
    positive = (labels[:, None] == labels) & ~itself
    anchors = positive.any(1)
    if not bool(anchors.any()):
        raise ValueError(
            f"none of {len(labels)} views shares its label with another one, expected at least two views of one label."
        )
    with torch.autocast(features.device.type, enabled=False):
        unit = F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=1)
        similar = (unit @ unit.t() / temperature).masked_fill(itself, -torch.inf)
        # masked_fill, because a product with zero would turn the diagonal's -inf into NaN
        log_shares = similar.log_softmax(1).masked_fill(~positive, 0.0).sum(1)
        return -(log_shares[anchors] / positive.sum(1)[anchors]).mean()


def contrastive_step(
    model: nn.Module,
    head: str,
    batch: Any,
    views: Callable[[Tensor], Tensor],
    temperature: float = TEMPERATURE,
) -> Tensor:
    """Run the model on two views of every image, and return the supervised contrastive loss of the head's input.

    The model gets only the images, as `pixel_values` if they come from a mapping, else as its first argument. The
    features are the first input of the head's first call. Of `(views, tokens, size)` the first token counts, because
    some heads pool the states of a ViT themselves. Of `(views, channels, height, width)` the mean over space counts.

    Args:
        model: model in training or evaluation mode. The function does not change the mode.
        head: path of the module that turns features into classes.
        batch: on the model's device. A mapping with `pixel_values` and `labels` (or `label`), or a tuple of the images
            (or such a mapping) and the labels `(batch,)`.
        views: takes images `(batch, ...)`. Returns `(2 * batch, ...)`, the first views of all images and then the
            second views; see `TwoViews`.
        temperature: number that divides the cosines. Default: 0.07.

    Raises:
        TypeError: images or labels are no tensors.
        ValueError: the batch has no images or labels, the model has no such head or does not call it, or shapes do not
            fit.
    """
    images, named = _images(batch)
    labels = labels_of(batch)
    if labels.shape != images.shape[:1]:
        raise ValueError(
            f"labels are {tuple(labels.shape)}, expected one for each of {len(images)} images, so ({len(images)},)."
        )
    if head not in {name for name, _ in model.named_modules(remove_duplicate=False) if name}:
        raise ValueError(
            f"{type(model).__name__} has no module {head!r}, expected the path of its classification head."
        )
    both = views(images)
    if len(both) != 2 * len(images):
        raise ValueError(f"views made {len(both)} images of {len(images)}, expected two of each.")
    inputs: Any = both
    if named:  # the model needs switches of the batch too, such as interpolate_pos_encoding
        given: Any = inputs_of(batch)
        inputs = {name: value for name, value in given.items() if isinstance(value, (bool, int, float, str))}
        inputs["pixel_values"] = both
    inputs = _first_input(model, head, inputs)
    return supervised_contrastive(_features(inputs, head), labels.repeat(2), temperature)


def _images(batch: Any) -> tuple[Tensor, bool]:
    """Return the images of a batch, and whether they are an item of a mapping.

    Raises:
        TypeError: the images are no tensor.
        ValueError: there are no images.
    """
    inputs = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    named = isinstance(inputs, Mapping)
    images = inputs.get("pixel_values") if isinstance(inputs, Mapping) else inputs
    if images is None:
        raise ValueError(f"the batch {contents_of(inputs)}, expected images as 'pixel_values'. {LOSS_REMEDY}")
    if not isinstance(images, Tensor):
        raise TypeError(f"the batch's images are of type {type(images).__name__}, expected a tensor. {LOSS_REMEDY}")
    return images, named


def _first_input(model: nn.Module, path: str, inputs: Tensor | dict[str, Any]) -> Any:
    """Run the model, and return the first argument of the first call of one of its modules.

    Args:
        model: model to run.
        path: path of the module.
        inputs: first argument of the model, or its arguments by name.

    Raises:
        ValueError: the model does not call the module.
    """
    seen: list[Any] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else next(iter(kwargs.values()), None))

    handle = model.get_submodule(path).register_forward_pre_hook(note, with_kwargs=True)
    try:
        model(**inputs) if isinstance(inputs, dict) else model(inputs)
    finally:
        handle.remove()
    if not seen:
        raise ValueError(
            f"{path}: not called when the model ran, expected the module that turns features into classes. "
            f"{LOSS_REMEDY}"
        )
    return seen[0]


def _features(inputs: Any, path: str) -> Tensor:
    """Return one vector per view, `(views, size)`, from the input of a head.

    Args:
        inputs: `(views, size)`; `(views, tokens, size)`, of which the first token counts; or
            `(views, channels, height, width)`, of which the mean over space counts.
        path: path of the head, for the error.

    Raises:
        ValueError: the input is of another kind or shape.
    """
    if isinstance(inputs, Tensor) and inputs.dim() == 2:
        return inputs
    if isinstance(inputs, Tensor) and inputs.dim() == 3:
        return inputs[:, 0]
    if isinstance(inputs, Tensor) and inputs.dim() == 4:
        return inputs.mean((2, 3))
    actual = tuple(inputs.shape) if isinstance(inputs, Tensor) else type(inputs).__name__
    raise ValueError(
        f"{path}: its input is {actual}, expected features (batch, size), (batch, tokens, size) or "
        f"(batch, channels, height, width). {LOSS_REMEDY}"
    )
