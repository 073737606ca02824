import numpy as np
import pytest
import torch
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from transformers import ViTImageProcessorPil

from peft_fps.vision.labelled_images import LabelledImages
from peft_fps.vision.pixels import Collator, ImageSplit, as_rgb, prepare, two_views
from tests.vision.conftest import picture


def split_of(images, **changes):
    dataset = Dataset.from_dict({"image": images}, features=Features({"image": ImageFeature()}))
    settings = {"size": {"height": 16, "width": 16}} | changes
    return ImageSplit(LabelledImages(dataset, [0, 1] * (len(images) // 2)), ViTImageProcessorPil(**settings))


def test_examples_are_normalised_pixels_and_labels():
    image = Image.new("RGB", (40, 20), (255, 0, 51))
    example = split_of([image, image])[1]
    expected = torch.tensor([1.0, -1.0, -0.6])[:, None, None].expand(3, 16, 16)
    torch.testing.assert_close(example["pixel_values"], expected)
    assert example["labels"] == 1


def test_kept_images_are_those_made_on_demand():
    split = split_of([picture(0, number) for number in range(4)])
    on_demand = [split[row]["pixel_values"] for row in range(4)]
    assert prepare({"train": split})
    assert split.kept.shape == (4, 3, 16, 16)
    assert all(torch.equal(split[row]["pixel_values"], on_demand[row]) for row in range(4))


def test_what_does_not_fit_is_not_kept(monkeypatch):
    split = split_of([picture(0, 0), picture(0, 1)])
    assert split.bytes == 2 * 3 * 16 * 16 * 4
    monkeypatch.setattr("peft_fps.vision.pixels.MEMORY_LIMIT", split.bytes - 1)
    assert not prepare({"train": split})
    assert split.kept is None


def test_different_sizes_are_refused():
    images = [Image.new("RGB", (20, 20)), Image.new("RGB", (20, 30))]
    with pytest.raises(ValueError, match=r"\(3, 20, 20\) and \(3, 30, 20\).*--image-size"):
        split_of(images, do_resize=False).keep("train")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "RGB"])
def test_every_mode_becomes_rgb(mode):
    image = as_rgb(Image.new("RGB", (2, 2), (255, 255, 255)).convert(mode))
    assert np.asarray(image).tolist() == [[[255, 255, 255]] * 2] * 2


def test_a_transparent_palette_becomes_rgb_without_a_warning():
    image = Image.new("P", (2, 2), 0)
    image.info["transparency"] = b"\x00\x80"
    assert as_rgb(image).mode == "RGB"


def test_batches():
    examples = [{"pixel_values": torch.full((3, 2, 2), float(row)), "labels": torch.tensor(row)} for row in range(5)]
    batch = Collator(interpolate=False)(examples)
    assert set(batch) == {"pixel_values", "labels"}
    assert batch["pixel_values"].shape == (5, 3, 2, 2)
    assert batch["labels"].tolist() == list(range(5))
    assert Collator(interpolate=True)(examples)["interpolate_pos_encoding"] is True


@pytest.mark.parametrize(
    ("settings", "mean", "std"),
    [
        ({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]),
        ({"do_normalize": False}, [0.0] * 3, [1.0] * 3),
    ],
    ids=["normalised", "not normalised"],
)
def test_views_are_normalised_as_the_processor_does(settings, mean, std):
    views = two_views(ViTImageProcessorPil(**settings))
    assert views.mean.expand(3, 1, 1).flatten().tolist() == pytest.approx(mean)
    assert views.std.expand(3, 1, 1).flatten().tolist() == pytest.approx(std)
    pixels = split_of([picture(0, 0), picture(1, 1)], **settings)[0]["pixel_values"]
    assert views(pixels[None]).shape == (2, 3, 16, 16)
