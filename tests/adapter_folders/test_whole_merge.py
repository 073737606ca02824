"""`peft-fps merge` of base models that it has to load whole: it says why, and writes the same."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.adapter_folders.merges import Case, check_same, gated_case, language_case, reference, rewrite, vision_case
from tests.support.helpers import tiny_gpt2, tiny_llama, tiny_vit
from tests.support.language_models import tiny_mixtral


def check_whole(case: Case, caplog: pytest.LogCaptureFixture, reason: str, **options: Any) -> None:
    """The merge falls back to memory, says why in one line, and writes the same."""
    with caplog.at_level(logging.WARNING, logger="peft_fps"):
        assert reason in case.merged()["loaded_whole"]
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("peft_fps")]
    assert len(lines) == 1
    assert "is loaded whole" in lines[0]
    assert reason in lines[0]
    check_same(case.folder / "out", reference(case.base, case.adapter, case.folder / "ref", **options))


def test_weights_that_are_split_on_loading(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    check_whole(gated_case(tmp_path), caplog, "mlp.gate_proj.weight is joined, split or transposed on loading")


def test_pickled_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    case = language_case(tiny_llama(), tmp_path, "5GB")
    torch.save(load_file(case.base / "model.safetensors"), case.base / "pytorch_model.bin")
    (case.base / "model.safetensors").unlink()
    check_whole(case, caplog, "there is neither model.safetensors nor")


def test_a_layer_with_a_forward_of_its_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    case = language_case(tiny_llama(), tmp_path)
    monkeypatch.setattr("transformers.models.llama.modeling_llama.nn.Linear", Own)
    check_whole(case, caplog, "has a forward of its own")


def test_a_name_that_is_stored_twice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    case = vision_case(tmp_path)
    own = "vit.layers.0.mlp.fc1.bias"
    rewrite(case.base, lambda held: held | {own: tiny_vit().state_dict()[own].clone()})
    with caplog.at_level(logging.WARNING, logger="peft_fps"):
        assert f"are both {own}" in case.merged()["loaded_whole"]


def test_tied_weights_of_which_the_file_holds_two_versions(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    case = language_case(tiny_gpt2(), tmp_path)
    rewrite(case.base, lambda held: held | {"lm_head.weight": held["transformer.wte.weight"] + 1})
    with pytest.warns(UserWarning, match="no longer tied after merging"):
        check_whole(case, caplog, "lm_head.weight and transformer.wte.weight differ")


def test_weights_that_no_layer_owns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    case = language_case(tiny_mixtral(), tmp_path, target_parameters=["experts.down_proj"], target_modules=["q_proj"])
    check_whole(case, caplog, "experts.down_proj is no layer of its own")


def test_embeddings_that_are_tied(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    case = language_case(tiny_gpt2(), tmp_path, target_modules=["wte"], bias="none")
    check_whole(case, caplog, "are one tensor")


def test_an_adapter_that_selects_tokens(tmp_path: Path) -> None:
    """Of the merged model, transformers' config says where it goes on selecting."""
    case = vision_case(tmp_path, token_keep_rate=0.5, token_blocks=[0])
    with pytest.warns(UserWarning, match="import peft_fps"):
        assert "selects tokens" in case.merged()["loaded_whole"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["fps_token_keep_rates"]
