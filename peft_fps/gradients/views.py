"""Two augmented views of every image, for the supervised contrastive loss."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn


SCALE = (0.08, 1.0)
JITTER = (0.4, 0.4, 0.4, 0.1)
"""Brightness, contrast, saturation, hue."""
TOLERANCE = 0.25
"""Largest distance of pixels from [0, 1]. Bicubic resizing of floats overshoots at edges."""


class TwoViews:
    """Makes two views of every image of a normalised batch, with the augmentations of GPS (arXiv 2312.10136).

    The augmentations are random resized crop (8 % to 100 % of the area), horizontal flip (p = 0.5), colour jitter
    (p = 0.8; brightness, contrast and saturation 0.4, hue 0.1) and grayscale (p = 0.2). They are drawn for every view
    of every image. The order of the four jitters is drawn once per batch. Images without 3 channels are only cropped
    and flipped. Torch's global CPU generator seeds the draws on every device.

    Args:
        mean: mean that the image processor subtracted (`image_mean`), one number or one per channel. Default: 0.5.
        std: standard deviation that it divided by (`image_std`), one number or one per channel. Default: 0.5.
        size: size of the views in pixels, one number or height and width. Default: size of the images.

    Raises:
        ImportError: kornia is not installed.
        ValueError: `std` is not positive.
    """

    def __init__(
        self,
        mean: float | Sequence[float] = 0.5,
        std: float | Sequence[float] = 0.5,
        size: int | Sequence[int] | None = None,
    ) -> None:
        _augmentations()
        self.mean = torch.as_tensor(mean, dtype=torch.float32, device="cpu").reshape(-1, 1, 1)
        self.std = torch.as_tensor(std, dtype=torch.float32, device="cpu").reshape(-1, 1, 1)
        self.size = (size, size) if isinstance(size, int) else size
        if not bool((self.std > 0).all()):
            raise ValueError(f"std is {std}, expected positive numbers.")

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return the first views of all images, and then the second views.

        Args:
            images: normalised images, `(batch, channels, height, width)`.

        Returns:
            Normalised views, `(2 * batch, channels, *size)` in the dtype of the images.

        Raises:
            ValueError: the images have another shape, or another normalisation.
        """
        if images.dim() != 4 or not images.numel() or not images.is_floating_point():
            raise ValueError(
                f"images are {tuple(images.shape)} ({images.dtype}), expected (batch, channels, height, width) "
                "of floating point, of one image at least."
            )
        channels = images.shape[1]
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, channels):
                raise ValueError(
                    f"{name} has {len(values)} numbers, expected 1 or one for each of {channels} channels."
                )
        mean, std = self.mean.to(images.device), self.std.to(images.device)
        pixels = images.float() * std + mean
        if channels == 3:
            pixels = _unit_range(pixels)
        height, width = self.size or images.shape[2:]
        views = _pipeline((height, width), colour=channels == 3)(pixels.repeat(2, 1, 1, 1))
        return ((views - mean) / std).to(images.dtype)


def _unit_range(pixels: Tensor) -> Tensor:
    """Return pixels clamped to [0, 1].

    Raises:
        ValueError: a pixel lies farther outside than `TOLERANCE`, so the normalisation is another one.
    """
    low, high = pixels.aminmax()
    if not (float(low) >= -TOLERANCE and float(high) <= 1 + TOLERANCE):
        raise ValueError(
            f"pixels lie between {float(low):.3g} and {float(high):.3g} after the normalisation is undone, expected 0 "
            "to 1. Pass the image processor's image_mean and image_std to TwoViews."
        )
    return pixels.clamp(0, 1)


def _pipeline(size: tuple[int, int], colour: bool) -> nn.Module:
    """Return the augmentations of images with pixels in [0, 1].

    Args:
        size: height and width of the views in pixels.
        colour: whether the images have 3 channels, so that jitter and grayscale apply.
    """
    library = _augmentations()
    steps = [
        # half-pixel centres, as in torchvision
        library.RandomResizedCrop(size, scale=SCALE, align_corners=False),
        library.RandomHorizontalFlip(p=0.5),
    ]
    if colour:
        steps += [library.ColorJitter(*JITTER, p=0.8), library.RandomGrayscale(p=0.2)]
    return nn.Sequential(*steps)


def _augmentations() -> Any:
    """Return the module `kornia.augmentation`.

    Raises:
        ImportError: kornia is not installed.
    """
    try:
        return import_module("kornia.augmentation")
    except ImportError as error:
        raise ImportError(
            'TwoViews needs kornia, which cannot be imported. Install it with `pip install "peft-fps[views]"`.'
        ) from error
