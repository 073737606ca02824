"""From images to pixel values as the recipes have it, with Pillow and torch alone."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL.Image import Image, Resampling, Transpose
from torch import Tensor

from peft_fps.reproduce.recipes import CROP_SHARE


SCALE, RATIO, ATTEMPTS = (0.08, 1.0), (3 / 4, 4 / 3), 10
INTERPOLATIONS = (Resampling.BILINEAR, Resampling.BICUBIC)
"""One of which is drawn for every random crop."""

Geometry = Callable[[Image], Image]


@dataclass(frozen=True)
class Direct:
    """Resizes to a square, bicubic, without keeping the aspect ratio."""

    size: int

    def __call__(self, image: Image) -> Image:
        return image.resize((self.size, self.size), Resampling.BICUBIC)


@dataclass(frozen=True)
class CentreCrop:
    """Resizes the shorter edge, bicubic, and cuts a square of 0.9 of it from the middle."""

    size: int

    def __call__(self, image: Image) -> Image:
        shorter = math.floor(self.size / CROP_SHARE)
        # the longer edge is rounded down, as torchvision rounds it
        width, height = (shorter * edge // min(image.size) for edge in image.size)
        resized = image.resize((width, height), Resampling.BICUBIC)
        left, top = round((width - self.size) / 2), round((height - self.size) / 2)
        return resized.crop((left, top, left + self.size, top + self.size))


@dataclass(frozen=True)
class RandomCrop:
    """Cuts 8 % to 100 % of the area at random, resizes it to a square, and mirrors every second one.

    The aspect ratio lies between 3/4 and 4/3, the interpolation is bilinear or bicubic. The numbers come from torch's
    global CPU generator.
    """

    size: int

    def __call__(self, image: Image) -> Image:
        box = random_box(*image.size)
        interpolation = INTERPOLATIONS[int(torch.randint(2, ()))]
        cropped = image.crop(box).resize((self.size, self.size), interpolation)
        return cropped.transpose(Transpose.FLIP_LEFT_RIGHT) if float(torch.rand(())) < 0.5 else cropped


def random_box(width: int, height: int) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of a random crop; of the middle, if ten draws do not fit the image."""
    for _ in range(ATTEMPTS):
        area = width * height * _uniform(*SCALE)
        ratio = math.exp(_uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < high <= height:
            left, top = int(torch.randint(width - wide + 1, ())), int(torch.randint(height - high + 1, ()))
            return left, top, left + wide, top + high
    wide, high = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    left, top = (width - wide) // 2, (height - high) // 2
    return left, top, left + wide, top + high


def _uniform(low: float, high: float) -> float:
    """Draw a number between two others from torch's global CPU generator."""
    return low + (high - low) * float(torch.rand(()))


class Transform:
    """Cuts or resizes an RGB image and normalises it; is called as an image processor of transformers is.

    Args:
        geometry: makes a square of the image.
        mean: what is subtracted, one number per channel.
        std: what is divided by.
    """

    def __init__(self, geometry: Geometry, mean: Sequence[float], std: Sequence[float]) -> None:
        self.geometry = geometry
        self.image_mean, self.image_std = list(mean), list(std)
        self.do_normalize = True

    def __call__(self, image: Image, return_tensors: str = "pt") -> dict[str, Any]:
        pixels = torch.from_numpy(np.array(self.geometry(image), dtype=np.float32)).permute(2, 0, 1) / 255
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.image_mean, self.image_std))
        normalised: Tensor = (pixels - mean) / std
        return {"pixel_values": normalised.unsqueeze(0)}
