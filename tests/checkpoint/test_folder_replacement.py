"""Saving over an old adapter replaces all or nothing."""

import json
import os
from pathlib import Path

import pytest
from peft import PeftModel

from peft_fps.checkpoint import folder_replacement, recover_adapter, save_adapter
from tests.support.helpers import adapted, bits, fill, layers_of, tiny_mlp, with_fields


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def values(model: PeftModel) -> dict[str, bytes]:
    return {path: bits(layer.fps_values["default"]) for path, layer in layers_of(model).items()}


def loaded(folder: Path) -> dict[str, bytes]:
    return values(PeftModel.from_pretrained(tiny_mlp(), folder))


@pytest.fixture
def model() -> PeftModel:
    return adapted(tiny_mlp(), target_modules=["first"])


@pytest.fixture(params=["one step", "two renames"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "two renames":
        monkeypatch.setattr(folder_replacement, "_exchange", lambda first, second: False)
    return request.param


def test_the_files_are_those_of_save_pretrained(model: PeftModel, tmp_path: Path) -> None:
    save_adapter(model, tmp_path / "new" / "adapter")
    model.save_pretrained(tmp_path / "plain")
    names = {path.name for path in (tmp_path / "plain").iterdir()}
    assert {path.name for path in (tmp_path / "new" / "adapter").iterdir()} == names == {CONFIG, WEIGHTS, "README.md"}
    for name in names:
        assert (tmp_path / "new" / "adapter" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_an_old_adapter_is_replaced_and_other_files_stay(way: str, model: PeftModel, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    save_adapter(model, folder)
    (folder / "notes.txt").write_text("kept")
    (folder / "other").mkdir()
    (folder / "other" / WEIGHTS).write_bytes(b"another adapter's")
    fill(model, seed=2)
    save_adapter(model, folder)
    assert loaded(folder) == values(model)
    assert (folder / "notes.txt").read_text() == "kept"
    assert (folder / "other" / WEIGHTS).read_bytes() == b"another adapter's"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_failure_leaves_the_old_adapter_bit_for_bit(
    way: str, model: PeftModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "adapter"
    save_adapter(model, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    fill(model, seed=2)

    def fail(directory: str, **options: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(model.peft_config["default"], "save_pretrained", fail)  # the weights are written by then
    with pytest.raises(OSError, match="disk full"):
        save_adapter(model, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("failing", [1, 2])
def test_a_rename_that_fails_leaves_the_old_adapter(
    failing: int, model: PeftModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_replacement, "_exchange", lambda first, second: False)
    folder, calls = tmp_path / "adapter", []
    save_adapter(model, folder)
    before, rename = values(model), os.rename
    fill(model, seed=2)

    def fail(source: Path, destination: Path) -> None:
        calls.append(source)
        if len(calls) == failing:
            raise OSError("busy")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="busy"):
        save_adapter(model, folder)
    assert loaded(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_an_adapter_is_recovered_between_the_two_renames(model: PeftModel, tmp_path: Path) -> None:
    """As a process leaves it that was killed there."""
    folder, previous = tmp_path / "adapter", tmp_path / ".adapter.previous"
    assert not recover_adapter(folder)
    save_adapter(model, folder)
    os.rename(folder, previous)
    assert recover_adapter(folder)
    assert loaded(folder) == values(model)
    os.rename(folder, previous)
    fill(model, seed=2)
    save_adapter(model, folder, selected_adapters=["default"])
    assert loaded(folder) == values(model)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_what_a_killed_process_left_is_cleared_away(model: PeftModel, tmp_path: Path) -> None:
    for name in (".adapter.saving", ".adapter.previous", "adapter"):
        model.save_pretrained(tmp_path / name)
    (tmp_path / ".adapter.saving" / WEIGHTS).write_bytes(b"half")
    save_adapter(model, tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert loaded(tmp_path / "adapter") == values(model)


def test_a_link_stays_a_link(model: PeftModel, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    save_adapter(model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert loaded(tmp_path / "real") == values(model)


def test_only_the_main_process_writes(model: PeftModel, tmp_path: Path) -> None:
    save_adapter(model, tmp_path / "adapter", is_main_process=False)
    assert list(tmp_path.iterdir()) == []


def test_files_and_the_working_directory_are_refused(
    model: PeftModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"file is a file, expected a folder"):
        save_adapter(model, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "within").mkdir()
    monkeypatch.chdir(tmp_path / "within")
    for folder in (".", tmp_path):
        with pytest.raises(ValueError, match="working directory"):
            save_adapter(model, folder)


def test_weights_of_one_save_and_config_of_another_are_refused(model: PeftModel, tmp_path: Path) -> None:
    """What PEFT's own save_pretrained leaves if it is killed between the two, with equal shapes."""
    model.save_pretrained(tmp_path / "old")
    fill(model, seed=2)
    model.save_pretrained(tmp_path / "new")
    (tmp_path / "old" / WEIGHTS).write_bytes((tmp_path / "new" / WEIGHTS).read_bytes())
    with pytest.raises(ValueError, match=r"with the digest \w{12}, expected \w{12} as adapter_config.json says"):
        loaded(tmp_path / "old")
    content = json.loads((tmp_path / "old" / CONFIG).read_text())
    (tmp_path / "old" / CONFIG).write_text(json.dumps(with_fields(content, tensors_sha256=None)))
    assert loaded(tmp_path / "old") == values(model)
