"""What is checked about an adapter folder before a model is touched."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from peft_fps.checkpoint import WEIGHTS, check_folder, is_pickled


GOOD = {"base_model.model.head.weight": torch.ones(2, 3), "base_model.model.body.fps_values": torch.ones(4)}


def check(folder: Path, *whole_tensors: str) -> None:
    check_folder(folder, whole_tensors, pickled=False)


def test_a_config_passes_alone_and_with_a_good_file(tmp_path: Path) -> None:
    check(tmp_path, "head.weight")
    save_file(GOOD, tmp_path / WEIGHTS)
    check(tmp_path)
    check(tmp_path, "head.weight")


def test_a_pickled_adapter_is_never_read_and_refused_unless_its_owner_said_so(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.bin").write_bytes(b"never opened")
    assert is_pickled(tmp_path)
    with pytest.raises(ValueError, match="adapter_model.bin is a pickled adapter.*expected adapter_model.saf"):
        check(tmp_path)
    check_folder(tmp_path, ["head.weight"], pickled=True)


@pytest.mark.parametrize("pickled", [False, True])
def test_safetensors_beside_a_pickle_is_what_counts(pickled: bool, tmp_path: Path) -> None:
    save_file(GOOD, tmp_path / WEIGHTS)
    (tmp_path / "adapter_model.bin").write_bytes(b"never opened")
    assert not is_pickled(tmp_path)
    check_folder(tmp_path, ["head.weight"], pickled)
    with pytest.raises(ValueError, match="lacks head.bias"):
        check_folder(tmp_path, ["head.bias"], pickled)


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 7, b"garbage!" * 40, save(GOOD)[:-3], save(GOOD)[:60], (2**62).to_bytes(8, "little") + b"{}"],
    ids=["empty", "seven bytes", "garbage", "end missing", "header cut", "huge header"],
)
def test_an_unreadable_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).write_bytes(content)
    with pytest.raises(ValueError, match=r"adapter_model.safetensors is not a readable safetensors file.*again"):
        check(tmp_path)


def test_a_folder_in_the_file_s_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).mkdir()
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        check(tmp_path)


@pytest.mark.parametrize("name", ["head.bias", "head", "ead.weight", "head.weigh", "body.head.weight"])
def test_a_missing_tensor_of_a_whole_module_is_refused(name: str, tmp_path: Path) -> None:
    save_file(GOOD, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=rf"lacks {name}, expected every tensor.*fetch or save it again"):
        check(tmp_path, "head.weight", name)


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_tensors_count_with_and_without_peft_s_prefix(prefix: str, tmp_path: Path) -> None:
    save_file({f"{prefix}vit.pooler.dense.bias": torch.ones(1)}, tmp_path / WEIGHTS)
    check(tmp_path, "vit.pooler.dense.bias")
