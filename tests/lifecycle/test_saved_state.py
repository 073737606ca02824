"""Saving what DeepSpeed's ZeRO stage 3 has partitioned, as far as a parameter shows it."""

from pathlib import Path
from typing import Any

import pytest
from peft import get_peft_model

from tests.support.helpers import config, fill, tiny_vit


def partition(parameter: Any) -> None:
    """Take a parameter's numbers away, as DeepSpeed does between the calls of its module."""
    parameter.ds_id, parameter.ds_numel = 0, parameter.numel()
    parameter.data = parameter.data.new_empty(0)


@pytest.mark.parametrize("kept", ["fps_", "classifier"])
def test_partitioned_adapters_are_saved_from_a_gathered_state_dict_alone(kept: str, tmp_path: Path) -> None:
    model: Any = get_peft_model(tiny_vit(), config(bias="with_norms"))
    fill(model)
    gathered = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "whole")
    for name, parameter in model.named_parameters():
        if kept not in name:  # small parameters stay whole
            partition(parameter)
    model.save_pretrained(tmp_path / "gathered", state_dict=gathered)
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "gathered")]
    assert files[0] == files[1]
    with pytest.raises(ValueError, match=r"partitioned by DeepSpeed's ZeRO stage 3, and the state dict has 0 of its"):
        model.save_pretrained(tmp_path / "apart")
    assert not (tmp_path / "apart" / "adapter_model.safetensors").exists()
