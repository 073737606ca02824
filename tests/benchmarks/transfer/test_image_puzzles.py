import numpy as np
import pytest
from PIL import Image

from peft_fps.benchmarks.transfer.image_puzzles import (
    SIDE,
    ink,
    rotated,
    scan_strength,
    squared,
    with_foreign_part,
    with_hues_turned,
    with_objects,
)


def noise(seed: int = 0, size: tuple[int, int] = (70, 90)) -> Image.Image:
    """Blocks of random colours."""
    levels = np.random.default_rng(seed).integers(0, 256, (size[0] // 10, size[1] // 10, 3), dtype=np.uint8)
    return Image.fromarray(levels.repeat(10, 0).repeat(10, 1))


def levels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def test_the_largest_square_in_the_middle():
    image = noise()
    assert (levels(squared(image)) == levels(image.crop((10, 0, 80, 70)).resize((SIDE, SIDE), Image.BICUBIC))).all()


def test_quarters_turn_the_disc_and_nothing_else():
    upright = levels(rotated(noise(), 0))
    y, x = np.indices((SIDE, SIDE)) - (SIDE - 1) / 2
    outside = x**2 + y**2 > (SIDE / 2 - 1) ** 2
    for quarter in range(4):
        found = levels(rotated(noise(), 90 * quarter))
        assert np.abs(found - np.rot90(upright, quarter)).mean() < 1
    for degrees in (0, 14.3, 100.0):
        assert (levels(rotated(noise(), degrees))[outside] == 127).all()
    assert np.abs(levels(rotated(noise(), 90)) - upright).mean() > 20


def test_a_foreign_part_is_the_other_images_at_the_same_place():
    found = levels(with_foreign_part(noise(), noise(1), (30, 5, 50, 40)))
    own, other = levels(squared(noise())), levels(squared(noise(1)))
    inside = np.zeros((SIDE, SIDE), bool)
    inside[5:40, 30:50] = True
    assert (found == np.where(inside[..., None], other, own)).all()


@pytest.mark.parametrize(("ground", "expected"), [(20, 215), (200, 0)])
def test_objects_stand_out_from_their_ground(ground, expected):
    background = Image.new("RGB", (50, 50), (ground,) * 3)
    strength = Image.fromarray(np.array([[255, 0], [0, 255]], dtype=np.uint8).repeat(10, 0).repeat(10, 1))
    found = levels(with_objects(background, [strength], [(40, 60, 60, 80)], [(1, 2, 3)]))
    assert (found[60:68, 40:48] == expected + np.array([1, 2, 3])).all()
    assert (found[72:80, 40:48] == ground).all()
    found[60:80, 40:60] = ground
    assert (found == ground).all()


def test_hues_are_turned_inside():
    red = Image.new("RGB", (40, 40), (200, 0, 0))
    found = levels(with_hues_turned(red, round(256 / 3)))
    assert tuple(found[0, 0]) == (200, 0, 0)
    np.testing.assert_allclose(found[SIDE // 2, SIDE // 2], (0, 200, 0), atol=4)
    assert (found[..., 1] > 100).mean() == pytest.approx(np.pi * 0.36**2, abs=0.01)
    frames = [levels(with_hues_turned(noise(), turn))[:, :12] for turn in (0, 43, 128)]
    assert all((frame == frames[0]).all() for frame in frames)


def test_strength_of_drawings_and_scans():
    paper = np.full((40, 30), 255, dtype=np.uint8)
    paper[10:30, 8:20] = 0
    found = np.asarray(ink(Image.fromarray(paper).convert("RGB")))
    assert found.shape == (20, 12)
    assert (found == 255).all()
    scan = Image.fromarray(np.array([[0, 100, 200]], dtype=np.uint8))
    assert np.asarray(scan_strength(scan)).tolist() == [[0, 160, 255]]
