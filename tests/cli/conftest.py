"""The fixtures of the tests of `vision` for the commands: one thread, a tiny model and its images."""

import pytest

from tests.vision.conftest import image_folder, one_thread, tiny_model


__all__ = ["image_folder", "one_thread", "tiny_model"]


@pytest.fixture
def no_picture(monkeypatch):
    """Training is not drawn, which takes a third of the time of a tiny training."""
    monkeypatch.setattr("peft_fps.vision.finetuning.draw_training", lambda records, path: None)
