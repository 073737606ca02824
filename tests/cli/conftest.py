"""The fixtures of the tests of `vision` for the commands: one thread, a tiny model and its images."""

from pathlib import Path

import pytest

from tests.vision.conftest import image_folder, one_thread, tiny_model, without_timm


__all__ = ["image_folder", "one_thread", "tiny_model", "without_timm"]


@pytest.fixture(scope="session")
def tiny_task(tiny_model: Path, image_folder: Path) -> list[object]:
    """Options that name the tiny model and its images."""
    return ["--model", tiny_model, "--data", image_folder]


@pytest.fixture
def no_picture(monkeypatch):
    """Training is not drawn, which takes a third of the time of a tiny training."""
    monkeypatch.setattr("peft_fps.vision.finetuning.draw_training", lambda records, path: None)
