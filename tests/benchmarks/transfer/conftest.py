"""Two tiny tasks and a tiny ViT with its image processor; nothing here comes from the code under test."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from peft_fps.benchmarks.transfer.cells import Setting
from peft_fps.benchmarks.transfer.tasks import load_task


SIDE = 16
TASKS = {"bright": ("natural", 3), "stripes": ("structured", 2)}
"""Group and number of classes by name."""
COUNTS = {"train": 5, "validation": 3, "test": 4}
"""Images of each class by split."""


def picture(task: str, label: int, number: int) -> np.ndarray:
    """A noisy image: a channel of the class is bright, or the stripes lie as the class says."""
    levels = np.random.default_rng([label, number]).integers(0, 90, (SIDE, SIDE, 3))
    if task == "bright":
        levels[..., label] += 120
    elif label == 0:
        levels[::2] += 120
    else:
        levels[:, ::2] += 120
    return levels.astype(np.uint8)


@pytest.fixture(scope="package")
def tasks_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("tasks")
    for task, (group, classes) in TASKS.items():
        for start, (split, count) in enumerate(COUNTS.items()):
            for label in range(classes):
                folder = root / task / split / f"class{label}"
                folder.mkdir(parents=True)
                for number in range(count):
                    Image.fromarray(picture(task, label, 100 * start + number)).save(folder / f"{number}.png")
        (root / task / "meta.json").write_text(json.dumps({"group": group}), encoding="utf-8")
    return root


@pytest.fixture(scope="package")
def model_folder(tmp_path_factory):
    """A random ViT of two layers for 16 px with a head of ten classes."""
    folder: Path = tmp_path_factory.mktemp("model") / "tiny"
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ViTForImageClassification(ViTConfig(image_size=SIDE, patch_size=4, num_labels=10, **sizes))
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="package")
def setting(model_folder, tasks_folder):
    yield Setting(
        str(model_folder),
        str(tasks_folder),
        image_size=SIDE,
        epochs=1,
        batch_size=4,
        precision="fp32",
        tuned_share=0.05,
    )
    load_task.cache_clear()
