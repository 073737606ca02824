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
Shade = tuple[int, int, int]
SHADES = 40
"""Largest part of a shade."""


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
    background: Image.Image, objects: Sequence[Image.Image], boxes: Sequence[Box], shades: Sequence[Shade]
) -> Image.Image:
    """Return a background with objects in boxes, light where it is dark in the box, and dark where it is light.

    Args:
        background: any image.
        objects: their strength, 255 where they cover the background, in mode `"L"`.
        boxes: of each, where it is enlarged or reduced to.
        shades: of each, what is added to black, or to a light grey.
    """
    found = squared(background)
    levels = np.asarray(found.convert("L"))
    for strength, box, shade in zip(objects, boxes, shades, strict=True):
        size = (box[2] - box[0], box[3] - box[1])
        ground = 255 - SHADES if levels[box[1] : box[3], box[0] : box[2]].mean() < 128 else 0
        colour = tuple(ground + part for part in shade)
        found.paste(Image.new("RGB", size, colour), box, strength.resize(size, Image.Resampling.BICUBIC))
    return found


def with_hues_turned(image: Image.Image, turn: int) -> Image.Image:
    """Return an image with the hues turned in the disc in its middle, which covers two fifths of the picture.

    Args:
        image: any image.
        turn: in 256ths of the circle of hues.
    """
    hue, saturation, value = squared(image).convert("HSV").split()

    def turned(by: int) -> Image.Image:
        hues = hue.point([(level + by) % 256 for level in range(256)])
        return Image.merge("HSV", (hues, saturation, value)).convert("RGB")

    return Image.composite(turned(turn), turned(0), _disc(0.36 * SIDE))


def ink(drawing: Image.Image) -> Image.Image:
    """Return the strength of a dark drawing on a light ground, cut to what is drawn, with its strokes widened."""
    strength = drawing.convert("L").point([255 - level for level in range(256)])
    box = strength.point([255 * (level > 96) for level in range(256)]).getbbox()
    return strength.crop(box).filter(ImageFilter.MaxFilter(5))


def scan_strength(scan: Image.Image) -> Image.Image:
    """Return the strength of a light scan on a dark ground, with strong strokes where it has middling ones."""
    return scan.convert("L").point([min(255, 8 * level // 5) for level in range(256)])


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
