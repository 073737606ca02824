"""Pictures whose class is a relation between their parts, made of other pictures: pure functions of PIL images.

What the class must not be read from is the same for all classes: the frame of the picture, values that fill it, and
how often pixels are interpolated. Every picture is `SIDE` pixels high and wide.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageFilter


SIDE = 112
MARGIN = 6
"""Pixels along each edge that hold no object."""
GREY = (127, 127, 127)
Box = tuple[int, int, int, int]
"""Left, upper, right, lower."""


def squared(image: Image.Image) -> Image.Image:
    """Return the largest square in the middle of an image as RGB, `SIDE` pixels high and wide."""
    return _square(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def rotated(image: Image.Image, degrees: float) -> Image.Image:
    """Return the disc in the middle of an image, turned counter-clockwise, on grey."""
    square = _square(image)
    turned = square.rotate(degrees, Image.Resampling.BICUBIC).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return Image.composite(turned, Image.new("RGB", turned.size, GREY), _disc(SIDE / 2 - 2))


def with_foreign_part(image: Image.Image, other: Image.Image, box: Box) -> Image.Image:
    """Return an image with the part of another one in a box, from the same place there."""
    found = squared(image)
    found.paste(squared(other).crop(box), box)
    return found


def with_objects(
    background: Image.Image, objects: Sequence[Image.Image], boxes: Sequence[Box], colours: Sequence[tuple[int, ...]]
) -> Image.Image:
    """Return a background with objects in boxes.

    Args:
        background: any image.
        objects: their strength, 255 where they cover the background, in mode `"L"`.
        boxes: of each, where it is enlarged or reduced to.
        colours: of each, red, green, blue.
    """
    found = squared(background)
    for strength, box, colour in zip(objects, boxes, colours, strict=True):
        size = (box[2] - box[0], box[3] - box[1])
        found.paste(Image.new("RGB", size, colour), box, strength.resize(size, Image.Resampling.BICUBIC))
    return found


def with_hues_turned(image: Image.Image, everywhere: int, inside: int) -> Image.Image:
    """Return an image with all hues turned, and those in the disc in its middle turned further.

    Args:
        image: any image.
        everywhere: turn of all hues, in 256ths of the circle.
        inside: further turn within the disc, which covers two fifths of the picture.
    """
    hue, saturation, value = squared(image).convert("HSV").split()
    turned = [
        Image.merge("HSV", (hue.point([(level + turn) % 256 for level in range(256)]), saturation, value))
        for turn in (everywhere + inside, everywhere)
    ]
    return Image.composite(*(part.convert("RGB") for part in turned), _disc(0.36 * SIDE))


def ink(drawing: Image.Image) -> Image.Image:
    """Return the strength of a dark drawing on a light ground, cut to what is drawn, with its strokes widened."""
    strength = drawing.convert("L").point([255 - level for level in range(256)])
    box = strength.point([255 * (level > 96) for level in range(256)]).getbbox()
    return strength.crop(box).filter(ImageFilter.MaxFilter(5))


def random_colour(rng: np.random.Generator) -> tuple[int, ...]:
    """Return a very light or a very dark colour, either with the same probability."""
    base = 215 if rng.random() < 0.5 else 0
    return tuple(int(base + rng.integers(0, 41)) for _ in range(3))


def _square(image: Image.Image) -> Image.Image:
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return image.convert("RGB").crop((left, top, left + side, top + side))


def _disc(radius: float) -> Image.Image:
    """Return a mask with 255 in a disc in the middle."""
    offset = np.arange(SIDE) - (SIDE - 1) / 2
    inside = offset[:, None] ** 2 + offset[None] ** 2 <= radius**2
    return Image.fromarray(np.where(inside, 255, 0).astype(np.uint8))
