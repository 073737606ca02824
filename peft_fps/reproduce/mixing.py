"""Mixup, CutMix and label smoothing of whole batches, as timm has them by default."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Beta
from torch.nn import functional

from peft_fps.reproduce.recipes import CUTMIX, MIXUP, SMOOTHING
from peft_fps.vision.pixels import Collator


@dataclass(frozen=True)
class MixingCollator:
    """Makes a training batch: its images mixed in reverse order, `labels` as shares, `(batch, classes)`.

    Each batch is mixed by mixup or by CutMix, either with probability 1/2. The numbers come from torch's global CPU
    generator.

    Args:
        collator: makes the batch before.
        classes: number of classes.
    """

    collator: Collator
    classes: int

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(examples)
        if float(torch.rand(())) < 0.5:
            share = float(Beta(CUTMIX, CUTMIX).sample())
            pixels, share = cutmix(batch["pixel_values"], share)
        else:
            share = float(Beta(MIXUP, MIXUP).sample())
            pixels = mixup(batch["pixel_values"], share)
        targets = mixup(smoothed(batch["labels"], self.classes, SMOOTHING), share)
        return batch | {"pixel_values": pixels, "labels": targets}


def smoothed(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """Return `(batch, classes)`: `smoothing` spread over all classes, the rest on the label of each row."""
    return functional.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes


def mixup(rows: Tensor, share: float) -> Tensor:
    """Return `share` of each row and the rest of the row that is as far from the end, `(batch, ...)`."""
    return rows * share + rows.flip(0) * (1 - share)


def cutmix(pixels: Tensor, share: float) -> tuple[Tensor, float]:
    """Paste a random box of the images in reverse order into the images, `(batch, channels, height, width)`.

    Args:
        pixels: the images.
        share: of the area that is to stay; the box is centred anywhere and cut off at the edges.

    Returns:
        The images and the share that did stay.
    """
    height, width = pixels.shape[-2:]
    side = (1 - share) ** 0.5
    top, bottom = _span(height, int(height * side))
    left, right = _span(width, int(width * side))
    mixed = pixels.clone()
    mixed[..., top:bottom, left:right] = pixels.flip(0)[..., top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)


def _span(length: int, cut: int) -> tuple[int, int]:
    """Return the ends of a cut around a random centre, within 0 to `length`."""
    centre = int(torch.randint(length, ()))
    return max(centre - cut // 2, 0), min(centre + (cut + 1) // 2, length)


def soft_cross_entropy(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Return the mean cross-entropy of logits with classes as shares, in the form that the Trainer calls."""
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs.logits
    return functional.cross_entropy(logits.float(), labels)
