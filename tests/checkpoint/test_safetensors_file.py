"""A file that safetensors cannot read is refused with one message, wherever it is opened."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from peft_fps.checkpoint import open_safetensors


GOOD = {"a": torch.arange(3), "b": torch.ones(2, 2)}


def test_an_intact_file(tmp_path: Path) -> None:
    save_file(GOOD, tmp_path / "f", {"who": "us"})
    with open_safetensors(tmp_path / "f") as file:
        assert sorted(file.keys()) == ["a", "b"]
        assert file.metadata() == {"who": "us"}
        assert torch.equal(file.get_tensor("a"), torch.arange(3))
        assert file.get_slice("b").get_shape() == [2, 2]


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 7, b"garbage!" * 40, save(GOOD)[:-3], save(GOOD)[:60], (2**62).to_bytes(8, "little") + b"{}"],
    ids=["empty", "seven bytes", "garbage", "end missing", "header cut", "huge header"],
)
def test_a_damaged_file_is_refused_with_path_found_expected_and_remedy(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(content)
    message = f"^{re.escape(str(path))} is not a readable safetensors file: found .+, expected an intact one.*again"
    with pytest.raises(ValueError, match=message), open_safetensors(path):
        pass


def test_a_tensor_that_cannot_be_read_is_refused_alike(tmp_path: Path) -> None:
    save_file(GOOD, tmp_path / "f")
    with (
        pytest.raises(ValueError, match="not a readable safetensors file: found .*missing"),
        open_safetensors(tmp_path / "f") as file,
    ):
        file.get_tensor("missing")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a readable safetensors file"), open_safetensors(tmp_path):
        pass


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), open_safetensors(tmp_path / "none"):
        pass


def test_what_the_block_itself_raises_comes_out_as_it_is(tmp_path: Path) -> None:
    save_file(GOOD, tmp_path / "f")
    with pytest.raises(json.JSONDecodeError), open_safetensors(tmp_path / "f"):
        json.loads("{")
