import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from peft_fps.reproduce.crops import CentreCrop, Direct, RandomCrop, Transform, random_box


def ramp(width, height):
    """Red grows from left to right, green from top to bottom, in steps of one level per pixel."""
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([columns % 256, rows % 256, 0 * rows], -1).astype(np.uint8))


def test_direct_resizing_does_not_keep_the_aspect_ratio():
    resized = np.array(Direct(50)(ramp(200, 100))).astype(float)
    assert resized.shape == (50, 50, 3)
    # away from the edges a linear ramp stays one: 4 levels per pixel from left to right, 2 from top to bottom
    assert np.abs(np.diff(resized[25, 5:45, 0]) - 4).max() <= 1
    assert np.abs(np.diff(resized[5:45, 25, 1]) - 2).max() <= 1


@pytest.mark.parametrize(("width", "height"), [(90, 45), (45, 90), (50, 50)])
def test_centre_crop_keeps_the_aspect_ratio_and_the_middle(width, height):
    cropped = np.array(CentreCrop(36)(ramp(width, height))).astype(float)  # the shorter edge becomes 40
    assert cropped.shape == (36, 36, 3)
    scale = min(width, height) / 40
    assert cropped[18, 17:19, 0].mean() == pytest.approx((width - 1) / 2, abs=1.5)
    assert cropped[17:19, 18, 1].mean() == pytest.approx((height - 1) / 2, abs=1.5)
    assert (cropped[18, 30, 0] - cropped[18, 5, 0]) / 25 == pytest.approx(scale, rel=0.1)


def test_the_recipes_sizes():
    sizes = []

    image = ramp(640, 480)
    resize = image.resize
    image.resize = lambda size, resample: sizes.append((size, resample)) or resize(size, resample)
    assert CentreCrop(224)(image).size == (224, 224)
    assert sizes == [((330, 248), Image.Resampling.BICUBIC)]


@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 2**31))
def test_random_boxes_lie_in_the_image(width, height, seed):
    torch.manual_seed(seed)
    left, top, right, bottom = random_box(width, height)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


def test_random_boxes_have_the_wanted_areas_and_ratios():
    torch.manual_seed(0)
    boxes = np.array([random_box(400, 400) for _ in range(2000)])
    wide, high = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area, ratio = wide * high / 400**2, wide / high
    assert area.min() >= 0.079
    assert area.min() < 0.1
    assert area.max() > 0.95
    assert ratio.min() == pytest.approx(3 / 4, abs=0.02)
    assert ratio.max() == pytest.approx(4 / 3, abs=0.02)
    assert np.log(ratio).mean() == pytest.approx(0, abs=0.02)  # as often wide as high
    # anywhere: the share of the free room to the left is uniform
    free = wide < 390
    places = boxes[free, 0] / (400 - wide[free])
    assert places.mean() == pytest.approx(0.5, abs=0.03)
    assert places.std() == pytest.approx(1 / math.sqrt(12), abs=0.03)


def test_an_image_in_which_no_box_fits_gives_its_middle():
    torch.manual_seed(0)
    boxes = {random_box(2000, 30) for _ in range(20)}
    assert (980, 0, 1020, 30) in boxes


def test_random_crops_are_mirrored_half_of_the_time():
    torch.manual_seed(0)
    image, crop = ramp(250, 250), RandomCrop(20)
    rising = [np.diff(np.array(crop(image))[10, :, 0].astype(int)).mean() > 0 for _ in range(300)]
    assert 0.4 < np.mean(rising) < 0.6


def test_random_crops_follow_torchs_seed():
    pictures = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        pictures.append(np.array(RandomCrop(24)(ramp(100, 80))))
    assert np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])


def test_normalisation():
    colour = Image.new("RGB", (4, 4), (0, 255, 51))
    pixels = Transform(Direct(2), (0.5, 0.5, 0.1), (0.5, 0.25, 0.2))(colour, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 2, 2)
    expected = torch.tensor([-1.0, 2.0, 0.5]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    torch.testing.assert_close(pixels, expected)
