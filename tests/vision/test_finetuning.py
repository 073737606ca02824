"""Parts of `peft-fps finetune` that the command's own tests do not reach."""

import sys
from pathlib import Path

import pytest

from peft_fps.vision.finetuning import draw_training


LOG = [{"loss": 2.0, "epoch": 0.5}, {"loss": 1.0, "epoch": 1.0}]


def test_training_is_drawn(tmp_path: Path) -> None:
    draw_training(LOG, tmp_path / "training.png")
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")


def test_an_empty_log_is_not_drawn(tmp_path: Path) -> None:
    draw_training([], tmp_path / "training.png")
    assert not (tmp_path / "training.png").exists()


def test_without_matplotlib_nothing_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("peft_fps.plots")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    draw_training(LOG, tmp_path / "training.png")
    assert not (tmp_path / "training.png").exists()
