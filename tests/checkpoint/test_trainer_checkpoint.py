"""Only a checkpoint that a Trainer has written to its end is resumed from."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import TrainerState

from peft_fps.checkpoint import last_complete_checkpoint
from tests.support.helpers import adapted, tiny_mlp


CONFIG, WEIGHTS, STATE = "adapter_config.json", "adapter_model.safetensors", "trainer_state.json"


def write(folder: Path, step: int) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    adapted(tiny_mlp(), target_modules=["first"]).save_pretrained(checkpoint)
    TrainerState(global_step=step).save_to_json(str(checkpoint / STATE))
    return checkpoint


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for step in (9, 10, 100):
        write(tmp_path, step)
    return tmp_path


def test_the_largest_step_counts(runs: Path) -> None:
    (runs / "checkpoint-1000-copy").mkdir()
    (runs / "checkpoint-2000").write_text("a file")
    assert last_complete_checkpoint(runs) == str(runs / "checkpoint-100")


def test_there_need_not_be_any(tmp_path: Path) -> None:
    assert last_complete_checkpoint(tmp_path / "missing") is None
    assert last_complete_checkpoint(tmp_path) is None


def cut(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return change


def other_step(folder: Path) -> None:
    content = json.loads((folder / STATE).read_text())
    (folder / STATE).write_text(json.dumps(content | {"global_step": 60}))


INCOMPLETE = {
    "empty": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
    "no state": lambda folder: (folder / STATE).unlink(),
    "half a state": cut(STATE),
    "empty state": lambda folder: (folder / STATE).write_bytes(b""),
    "state of another step": other_step,
    "state of another kind": lambda folder: (folder / STATE).write_text("[100]"),
    "half the weights": cut(WEIGHTS),
    "half a config": cut(CONFIG),
    "no config": lambda folder: (folder / CONFIG).unlink(),
}


@pytest.mark.parametrize("case", INCOMPLETE)
def test_an_incomplete_one_is_passed_over(case: str, runs: Path) -> None:
    INCOMPLETE[case](runs / "checkpoint-100")
    assert last_complete_checkpoint(runs) == str(runs / "checkpoint-10")


def test_adapters_in_subfolders_count_too(runs: Path) -> None:
    shutil.copytree(runs / "checkpoint-9", runs / "checkpoint-100" / "second")
    assert last_complete_checkpoint(runs) == str(runs / "checkpoint-100")
    cut(WEIGHTS)(runs / "checkpoint-100" / "second")
    assert last_complete_checkpoint(runs) == str(runs / "checkpoint-10")
