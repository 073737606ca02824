"""From images to the pixel values that a model takes."""

from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from peft_fps.gradients import TwoViews
from peft_fps.vision.labelled_images import LabelledImages


MEMORY_LIMIT = 2 * 1024**3
"""Bytes of pixel values, all splits together, up to which images are prepared once and kept."""


class ImageSplit(Dataset[dict[str, Any]]):
    """A split as examples of `pixel_values`, float32 `(channels, height, width)`, and `labels`, a class index.

    Args:
        source: the images and their classes.
        processor: an image processor of transformers.
    """

    def __init__(self, source: LabelledImages, processor: Any) -> None:
        self.source = source
        self.processor = processor
        self.labels = torch.tensor(source.labels)
        self.kept: Tensor | None = None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, row: int) -> dict[str, Any]:
        pixels = self.kept[row] if self.kept is not None else self._pixels(row)
        return {"pixel_values": pixels, "labels": self.labels[row]}

    @property
    def bytes(self) -> int:
        """Size of the pixel values of all rows, as float32."""
        first = self._pixels(0)
        return len(self) * first.numel() * first.element_size()

    def keep(self, name: str) -> None:
        """Prepare all images now and keep their pixel values in memory.

        Args:
            name: of the split, shown beside the progress bar.

        Raises:
            ValueError: the image processor makes images of different sizes.
        """
        rows = tqdm(range(len(self)), desc=f"Preparing {name}")
        first = self._pixels(0)
        kept = torch.empty(len(self), *first.shape)
        for row in rows:
            pixels = self._pixels(row)
            if pixels.shape != first.shape:
                raise ValueError(
                    f"The image processor makes images of different sizes, {tuple(first.shape)} and "
                    f"{tuple(pixels.shape)}, expected one size; give it with --image-size."
                )
            kept[row] = pixels
        self.kept = kept

    def _pixels(self, row: int) -> Tensor:
        """Return the pixel values of a row, `(channels, height, width)`, made by the image processor."""
        image = as_rgb(self.source.images[row]["image"])
        pixels: Tensor = self.processor(image, return_tensors="pt")["pixel_values"][0]
        return pixels


def as_rgb(image: Image) -> Image:
    """Return the image in RGB, whatever its mode is."""
    if image.mode == "P" and "transparency" in image.info:  # Pillow warns if such a palette loses its alpha directly
        image = image.convert("RGBA")
    return image.convert("RGB")


def prepare(splits: dict[str, ImageSplit]) -> bool:
    """Keep the pixel values of all splits in memory if they fit; returns whether they do."""
    fits = sum(split.bytes for split in splits.values()) <= MEMORY_LIMIT
    if fits:
        for name, split in splits.items():
            split.keep(name)
    return fits


def two_views(processor: Any) -> TwoViews:
    """Return what makes two augmented views of the images that a processor has normalised.

    Raises:
        ImportError: kornia is not installed.
    """
    if not getattr(processor, "do_normalize", True):
        return TwoViews(mean=0.0, std=1.0)
    normal = getattr(processor, "data_config", None) or {k: getattr(processor, f"image_{k}") for k in ("mean", "std")}
    return TwoViews(normal["mean"], normal["std"])


@dataclass(frozen=True)
class Collator:
    """Makes a batch of examples: `pixel_values` `(batch, channels, height, width)` and `labels` `(batch,)`.

    Args:
        interpolate: let the model interpolate its position embeddings to the size of the images.
    """

    interpolate: bool

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = {key: torch.stack([example[key] for example in examples]) for key in ("pixel_values", "labels")}
        return batch | ({"interpolate_pos_encoding": True} if self.interpolate else {})
