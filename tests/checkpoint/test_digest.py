"""The digest follows from the tensors alone."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from peft_fps.checkpoint import tensors_digest
from tests.support.helpers import adapted, bits, tiny_mlp


TENSORS = {
    "a.fps_values": torch.tensor([1.5, -2.0]),
    "a.fps_columns": torch.tensor([0, 3], dtype=torch.int32).to(torch.uint16),
    "b.fps_bias": torch.tensor([0.25], dtype=torch.bfloat16),
}


def reference(tensors: dict[str, Tensor]) -> str:
    parts = [
        hashlib.sha256(f"{key.split('.')[-1]} {held.dtype} {tuple(held.shape)} ".encode() + bits(held)).digest()
        for key, held in tensors.items()
    ]
    return hashlib.sha256(b"".join(sorted(parts))).hexdigest()


def test_it_is_that_of_the_reference() -> None:
    assert tensors_digest(TENSORS) == reference(TENSORS)


def test_order_names_of_modules_and_layout_do_not_matter() -> None:
    renamed = {f"base_model.model.x.{key}": held for key, held in reversed(TENSORS.items())}
    strided = torch.stack([TENSORS["a.fps_values"], torch.zeros(2)], 1)[:, 0]
    assert not strided.is_contiguous()
    assert tensors_digest(renamed | {"base_model.model.x.a.fps_values": strided}) == reference(TENSORS)
    assert tensors_digest(TENSORS | {"head.weight": torch.ones(1)}) == reference(TENSORS)


@pytest.mark.parametrize(
    "changed",
    [
        {"a.fps_values": torch.tensor([1.5, -2.0000002])},
        {"a.fps_values": torch.tensor([-2.0, 1.5])},
        {"a.fps_values": torch.tensor([[1.5, -2.0]])},
        {"a.fps_columns": torch.tensor([0, 3], dtype=torch.int32)},
        {"a.fps_bias": torch.tensor([1.5])},
    ],
    ids=["last place", "order", "shape", "dtype", "one more"],
)
def test_every_change_matters(changed: dict[str, Tensor]) -> None:
    assert tensors_digest(TENSORS | changed) != tensors_digest(TENSORS)


def test_a_saved_config_holds_that_of_the_file(tmp_path: Path) -> None:
    adapted(tiny_mlp(), target_modules=["first"], modules_to_save=["last"]).save_pretrained(tmp_path)
    found = {k: t for k, t in load_file(tmp_path / "adapter_model.safetensors").items() if ".fps_" in k}
    assert len(found) == 4
    assert json.loads((tmp_path / "adapter_config.json").read_text())["record"]["tensors_sha256"] == reference(found)
