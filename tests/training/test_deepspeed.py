"""Training with DeepSpeed's ZeRO stages through the Trainer, by two processes on the CPU (gloo)."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from peft_fps import Selection
from tests.support.helpers import tiny_vit
from tests.support.processes import run_together
from tests.training import deepspeed_program
from tests.training.ddp_program import Images
from tests.training.trainers import assert_equal_tensors


pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install deepspeed (DS_BUILD_OPS=0)")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deepspeed")
    run_together(deepspeed_program.main, folder)
    return folder


@pytest.mark.parametrize("stage", deepspeed_program.STAGES)
def test_processes_select_what_one_process_selects(stage, two):
    images = Images()
    model = deepspeed_program.adapted()
    model.calibrate([{"pixel_values": images.pixels}], progress=False)
    selected = Selection.from_adapter(two / str(stage) / "adapter")
    assert selected.modules == Selection.of(model).modules
    assert selected.method["calibration"]["examples"] == len(images)
    loaded = PeftModel.from_pretrained(tiny_vit(3), two / str(stage) / "adapter")
    assert any(p.any() for name, p in loaded.named_parameters() if "fps_values" in name)


@pytest.mark.parametrize("stage", deepspeed_program.STAGES)
def test_training_resumes_where_it_was(stage, two):
    folder = two / str(stage)
    assert_equal_tensors(*(load_file(folder / name / "adapter_model.safetensors") for name in ("adapter", "resumed")))


@pytest.mark.parametrize("stage", deepspeed_program.STAGES)
def test_entries_are_trained_as_they_are_and_the_reason_is_told(stage, two):
    for rank in range(2):
        told = (two / str(stage) / f"centring{rank}.txt").read_text()
        assert told.startswith("nothing is trained with centred inputs: ")
        assert "DeepSpeed" in told


def test_partitioned_models_train_and_save_what_was_calibrated_before(two):
    partitioned, plain = (load_file(two / stage / "adapter" / "adapter_model.safetensors") for stage in ("3", "1"))
    assert partitioned.keys() == plain.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(partitioned[name], tensor, rtol=1e-2, atol=1e-4)


def test_partitioned_models_are_refused_with_what_to_do(two):
    for rank in range(2):
        refusal = (two / f"refused{rank}.txt").read_text()
        assert "partitioned by DeepSpeed's ZeRO stage 3" in refusal
        assert "before the model is sharded" in refusal
