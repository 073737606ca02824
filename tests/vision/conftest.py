"""Tiny images, folders of them in every kind, and a tiny model; nothing here comes from the code under test."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil


SIDE = 32


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Tiny models gain nothing from a second thread, and lose much where another process wants the core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def picture(label: int, number: int) -> Image.Image:
    """A noisy RGB image whose red (label 0), green (1) or blue (2) channel is bright."""
    levels = np.random.default_rng([label, number]).integers(0, 100, (SIDE, SIDE, 3))
    levels[..., label] += 150
    return Image.fromarray(levels.astype(np.uint8))


def write_classes(folder: Path, count: int, names=("blue", "red"), start: int = 0) -> None:
    """`count` images per class, each class in a subfolder of its name."""
    for label, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for number in range(start, start + count):
            picture(label, number).save(folder / name / f"{number}.png")


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """train/, validation/ and test/ with 8, 3 and 4 images for each of two classes; no test writes to it."""
    folder = tmp_path_factory.mktemp("images") / "photos"
    for start, (split, count) in enumerate({"train": 8, "validation": 3, "test": 4}.items()):
        write_classes(folder / split, count, start=100 * start)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A random ViT for 32 px with a head of two classes, stored in float16, beside its image processor."""
    folder = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ViTForImageClassification(ViTConfig(image_size=SIDE, patch_size=8, num_labels=2, **sizes))
    model.half().save_pretrained(folder)
    ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


@pytest.fixture
def without_timm(monkeypatch):
    """No module can be imported where the package asks for timm."""

    def fail(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr("peft_fps.vision.timm_names.import_module", fail)
