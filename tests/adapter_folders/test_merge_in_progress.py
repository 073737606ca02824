"""`peft-fps merge` while it goes from file to file: its checks, an interruption, and the memory it holds."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from peft_fps.adapter_folders import shard_writing
from peft_fps.adapter_folders.stored_weights import StoredTensor
from tests.adapter_folders.merges import language_case, rewrite
from tests.cli.saved import check_user_error, edit_tensors, run
from tests.support.helpers import tiny_llama


def test_changes_that_rounding_loses_are_warned_of(tmp_path: Path) -> None:
    case = language_case(tiny_llama(), tmp_path)
    name = "model.layers.0.self_attn.q_proj.fps_values"
    values = load_file(case.adapter / "adapter_model.safetensors")[f"base_model.model.{name}"]
    edit_tensors(case.adapter, {name: torch.full_like(values, 1e-7)})
    with pytest.warns(UserWarning, match=rf"Merging lost {values.numel()} of .* torch\.bfloat16 weights"):
        case.merged(dtype="bfloat16")


def test_a_sum_that_overflows_is_refused(tmp_path: Path) -> None:
    case = language_case(tiny_llama(), tmp_path)
    name = "model.layers.1.mlp.down_proj.fps_values"
    values = load_file(case.adapter / "adapter_model.safetensors")[f"base_model.model.{name}"]
    edit_tensors(case.adapter, {name: torch.full_like(values, 1e5)})
    out = tmp_path / "out"
    message = check_user_error(run("merge", case.adapter, "--output", out, "--dtype", "float16"))
    assert "model.layers.1.mlp.down_proj would hold NaN or infinity" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_another_base_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = language_case(tiny_llama(), tmp_path)
    rewrite(case.base, lambda held: held | {(name := "model.layers.0.mlp.up_proj.weight"): held[name] + 1})
    monkeypatch.setattr(shard_writing, "save_file", lambda *_, **__: pytest.fail("written"))
    with pytest.raises(ValueError, match="made from another base model"):
        case.merged()


def test_an_interrupted_merge_leaves_nothing_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = language_case(tiny_llama(), tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    calls = 0

    def interrupted(tensors: dict[str, Tensor], path: Path, **options: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            with pytest.raises((OSError, ValueError)):
                AutoModelForCausalLM.from_pretrained(path.parent)
            raise KeyboardInterrupt
        save_file(tensors, path, **options)

    monkeypatch.setattr(shard_writing, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        case.merged()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "out"]


@contextmanager
def live_bytes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Count the bytes of tensors read to be written that are alive, at each read."""
    live, counts = 0, [0]
    read = StoredTensor.read

    def counted(self: StoredTensor, *, mapped: bool = False) -> Tensor:
        nonlocal live
        tensor = read(self, mapped=mapped)
        if not mapped:
            size = tensor.nbytes
            live += size
            counts.append(live)

            def gone() -> None:
                nonlocal live
                live -= size

            weakref.finalize(tensor.untyped_storage(), gone)
        return tensor

    with monkeypatch.context() as patch:
        patch.setattr(StoredTensor, "read", counted)
        yield counts


def test_the_tensors_of_one_file_are_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = language_case(tiny_llama(), tmp_path)
    sizes = [sum(t.nbytes for t in load_file(file).values()) for file in case.base.glob("*.safetensors")]
    with live_bytes(monkeypatch) as counts:
        case.merged()
    assert max(counts) == max(sizes)
    assert sum(sizes) > 3 * max(sizes)
