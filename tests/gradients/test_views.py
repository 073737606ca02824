"""Views by what can be seen of them: ramps tell where a crop was taken, plain colours how it was jittered."""

import colorsys
import random
import sys
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from peft_fps.gradients.views import TwoViews


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pictures(batch: int = 4, channels: int = 3, height: int = 16, width: int = 16) -> Tensor:
    """Pixels in [0, 1]."""
    return torch.rand(batch, channels, height, width, generator=torch.Generator().manual_seed(0))


def plain(colour: tuple[float, float, float], batch: int) -> Tensor:
    return torch.tensor(colour).view(1, 3, 1, 1).expand(batch, 3, 8, 8)


def seeded(views: TwoViews, x: Tensor, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return views(x)


def crops(batch: int, height: int = 32, width: int = 32) -> tuple[Tensor, Tensor]:
    """Views of two ramps, in pixels of the image: what each column and each row shows."""
    across = torch.arange(width).float().expand(batch, height, width)
    down = torch.arange(height).float()[:, None].expand(batch, height, width)
    seen = seeded(TwoViews(mean=0.0, std=1.0), torch.stack([across, down], 1))
    # a crop shows the same columns in every row, and the same rows in every column
    torch.testing.assert_close(seen[:, 0], seen[:, 0, :1].expand_as(seen[:, 0]))
    torch.testing.assert_close(seen[:, 1], seen[:, 1, :, :1].expand_as(seen[:, 1]))
    return seen[:, 0, 0], seen[:, 1, :, 0]


@pytest.mark.parametrize("shape", [(1, 3, 16, 16), (4, 3, 12, 20), (2, 1, 16, 16), (2, 4, 9, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_two_views_of_the_images_shape_and_dtype(shape: tuple[int, ...], dtype: torch.dtype):
    x = ((pictures(*shape) - 0.5) / 0.5).to(dtype)
    before = x.clone()
    found = TwoViews()(x.requires_grad_())
    assert found.shape == (2 * shape[0], *shape[1:])
    assert found.dtype == dtype
    assert not found.requires_grad
    assert -1 - 1e-2 < float(found.min()) < float(found.max()) < 1 + 1e-2
    assert torch.equal(x, before)


@pytest.mark.parametrize(("size", "expected"), [(8, (8, 8)), ((6, 10), (6, 10)), ([20, 5], (20, 5))], ids=str)
def test_views_of_another_size(size: int | tuple[int, int], expected: tuple[int, int]):
    assert TwoViews(size=size)(pictures()).shape == (8, 3, *expected)


def test_torchs_generator_alone_decides():
    views, x = TwoViews(), pictures()
    before = random.getstate(), np.random.get_state()[1].tobytes()
    first = seeded(views, x, 1)
    assert torch.equal(first, seeded(views, x, 1))
    assert torch.equal(first, seeded(TwoViews(), x, 1))
    assert not torch.equal(first, seeded(views, x, 2))
    assert (random.getstate(), np.random.get_state()[1].tobytes()) == before


def test_every_view_of_every_image_is_drawn_anew():
    same = pictures(1).expand(6, -1, -1, -1)
    found = seeded(TwoViews(), same)
    assert all(not torch.equal(found[i], found[j]) for i in range(12) for j in range(i))


def test_the_first_views_come_before_the_second_ones():
    levels = torch.tensor([0.1, 0.5, 0.9])
    x = levels.view(3, 1, 1, 1).expand(3, 2, 8, 8)  # two channels: crops and flips alone leave plain images alone
    found = seeded(TwoViews(mean=0.0, std=1.0), x)
    torch.testing.assert_close(found.mean((1, 2, 3)), levels.repeat(2))


def test_crops_have_the_areas_and_shapes_of_the_paper():
    columns, rows = crops(200)
    # the outermost half pixels are clamped where the crop is resized: its length follows from the slope
    width, height = ((side.diff(dim=1).abs().amax(1)) * 32 for side in (columns, rows))
    share, aspect = width * height / 32**2, width / height
    assert 0.08 * 0.85 < float(share.min()) < 0.13
    assert 0.9 < float(share.max()) <= 1 + 1e-4
    assert 0.45 < float(share.mean()) < 0.6  # uniform between 0.08 and 1, less those that did not fit
    assert 0.75 * 0.85 < float(aspect.min()) < 0.8
    assert 1.25 < float(aspect.max()) < 4 / 3 * 1.15
    assert 0.95 < float(aspect.log().mean().exp()) < 1.05


def test_crops_lie_within_the_image_and_reach_all_of_it():
    columns, rows = crops(200)
    for side in (columns, rows):
        assert float(side.min()) == pytest.approx(0, abs=1e-4)
        assert float(side.max()) == pytest.approx(31, abs=1e-4)


def test_half_of_the_views_are_flipped_and_none_is_upside_down():
    columns, rows = crops(200)
    flipped = (columns[:, -1] < columns[:, 0]).float()
    assert 0.4 < float(flipped.mean()) < 0.6  # 400 draws: four standard deviations
    assert 0.3 < float((flipped[:200] != flipped[200:]).float().mean()) < 0.7
    assert bool((rows[:, -1] > rows[:, 0]).all())


def test_a_fifth_of_the_views_are_gray():
    found = seeded(TwoViews(mean=0.0, std=1.0), plain((0.7, 0.4, 0.2), 400))
    gray = (found.amax(1) - found.amin(1)).amax((1, 2)) < 1e-4
    assert 0.14 < float(gray.float().mean()) < 0.26  # 800 draws: four standard deviations
    # of those, a fifth kept the colour's own brightness (ITU-R BT.601)
    luminance = 0.299 * 0.7 + 0.587 * 0.4 + 0.114 * 0.2
    kept = (found[gray] - luminance).abs().amax((1, 2, 3)) < 1e-3
    assert 0.06 < float(kept.float().mean()) < 0.36


def test_a_fifth_of_the_coloured_views_are_not_jittered():
    x = plain((0.7, 0.4, 0.2), 400)
    found = seeded(TwoViews(mean=0.0, std=1.0), x)
    coloured = (found.amax(1) - found.amin(1)).amax((1, 2)) > 1e-4
    untouched = (found - x.repeat(2, 1, 1, 1)).abs().amax((1, 2, 3)) < 1e-5
    assert 0.14 < float(untouched[coloured].float().mean()) < 0.26


def test_brightness_is_multiplied_by_0_6_to_1_4():
    # contrast, saturation and hue leave a plain gray as it is
    found = seeded(TwoViews(mean=0.0, std=1.0), plain((0.5, 0.5, 0.5), 200)).mean((1, 2, 3)) / 0.5
    assert 0.6 - 1e-4 <= float(found.min()) < 0.63
    assert 1.37 < float(found.max()) <= 1.4 + 1e-4
    assert 0.95 < float(found.mean()) < 1.05


def test_hue_turns_by_a_tenth_and_contrast_and_saturation_by_0_6_to_1_4():
    colour = (0.5, 0.4, 0.45)
    found = seeded(TwoViews(mean=0.0, std=1.0), plain(colour, 400)).mean((2, 3)).tolist()
    coloured = [pixel for pixel in found if max(pixel) - min(pixel) > 1e-4]
    hue = colorsys.rgb_to_hsv(*colour)[0]
    turns = [(colorsys.rgb_to_hsv(*pixel)[0] - hue + 0.5) % 1 - 0.5 for pixel in coloured]
    assert -0.1 - 1e-3 <= min(turns) < -0.09
    assert 0.09 < max(turns) <= 0.1 + 1e-3

    def strength(pixel: Sequence[float]) -> float:
        return (max(pixel) - min(pixel)) / (0.299 * pixel[0] + 0.587 * pixel[1] + 0.114 * pixel[2])

    # both blend a plain colour with its gray, so that it keeps 0.6 * 0.6 to 1.4 * 1.4; turning the hue moves its gray
    strengths = [strength(pixel) / strength(colour) for pixel in coloured]
    assert 0.36 * 0.9 < min(strengths) < 0.5
    assert 1.6 < max(strengths) < 1.96 * 1.1


@pytest.mark.parametrize(("mean", "std"), [(0.5, 0.5), (MEAN, STD), (list(MEAN), 0.3), (0.0, 1.0)], ids=str)
def test_normalisation_is_undone_and_done_again(mean: float | tuple[float, ...], std: float | tuple[float, ...]):
    def normalise(pixels: Tensor) -> Tensor:
        m, s = (torch.as_tensor(values, dtype=torch.float32).expand(3).view(1, 3, 1, 1) for values in (mean, std))
        return (pixels - m) / s

    x = pictures()
    expected = normalise(seeded(TwoViews(mean=0.0, std=1.0), x))
    torch.testing.assert_close(seeded(TwoViews(mean, std), normalise(x)), expected, rtol=1e-3, atol=1e-3)


def test_autocast_changes_nothing():
    x = pictures()
    expected = seeded(TwoViews(), x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(seeded(TwoViews(), x), expected)


@pytest.mark.parametrize("x", [255 * pictures(), (pictures() - 0.5) / 0.2, torch.full((1, 3, 4, 4), torch.nan)])
def test_images_normalised_in_another_way_are_refused(x: Tensor):
    with pytest.raises(ValueError, match=r"pixels lie between .*expected 0 to 1.*image_mean and image_std"):
        TwoViews()(x)


def test_what_resizing_overshoots_is_cut_off():
    x = torch.full((4, 3, 8, 8), 1.1)
    x[:, :, :, :4] = -0.1
    found = TwoViews(mean=0.0, std=1.0)(x)
    assert 0 <= float(found.min()) <= float(found.max()) <= 1


@pytest.mark.parametrize(
    "x",
    [pictures()[0], pictures()[None], torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(0, 3, 4, 4)],
    ids=["one-image", "video", "bytes", "none"],
)
def test_other_tensors_are_refused(x: Tensor):
    with pytest.raises(ValueError, match=r"expected \(batch, channels, height, width\) of floating point") as error:
        TwoViews()(x)
    assert f"images are {tuple(x.shape)} ({x.dtype})" in str(error.value)


def test_numbers_that_do_not_fit_the_channels_are_refused():
    with pytest.raises(ValueError, match="mean has 3 numbers, expected 1 or one for each of 4 channels"):
        TwoViews(MEAN, STD)(pictures(channels=4))
    with pytest.raises(ValueError, match="std has 2 numbers, expected 1 or one for each of 3 channels"):
        TwoViews(0.5, (0.5, 0.5))(pictures())
    with pytest.raises(ValueError, match=r"std is \(0.2, 0\), expected positive"):
        TwoViews(0.5, (0.2, 0))


def test_without_kornia_the_error_says_how_to_install_it(monkeypatch):
    for name in ("kornia", "kornia.augmentation"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r'pip install "peft-fps\[views\]"'):
        TwoViews()
