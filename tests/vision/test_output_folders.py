"""Output folders are written whole or not at all."""

from pathlib import Path

import pytest

from peft_fps.vision.output_folders import check_output, written_whole


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("before", [{}, {"old.txt": "old"}])
def test_what_is_written_takes_the_folders_place(tmp_path: Path, before: dict[str, str]) -> None:
    output = tmp_path / "deep" / "out"
    for name, text in before.items():
        output.mkdir(parents=True, exist_ok=True)
        (output / name).write_text(text)
    with written_whole(output) as folder:
        (folder / "new.txt").write_text("new")
        assert not output.exists() or content(output) == before
    assert content(tmp_path) == {"deep/out/new.txt": "new"}
    assert [path.name for path in output.parent.iterdir()] == ["out"]


def write_half(output: Path, stopped_by: type[BaseException]) -> None:
    with written_whole(output) as folder:
        (folder / "half.txt").write_text("half")
        raise stopped_by


@pytest.mark.parametrize("stopped_by", [OSError, KeyboardInterrupt])
def test_what_was_not_finished_leaves_the_folder(tmp_path: Path, stopped_by: type[BaseException]) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "old.txt").write_text("old")
    for target in (output, tmp_path / "none"):
        with pytest.raises(stopped_by):
            write_half(target, stopped_by)
    assert content(tmp_path) == {"out/old.txt": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_old_folder_comes_back_if_the_new_one_cannot_take_its_place(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "old.txt").write_text("old")
    with pytest.raises(OSError, match="new"), written_whole(output) as folder:
        folder.rmdir()
    assert content(tmp_path) == {"out/old.txt": "old"}


def test_a_folder_through_a_link_is_replaced_behind_it(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with written_whole(tmp_path / "link") as folder:
        (folder / "new.txt").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert content(tmp_path / "real") == {"new.txt": "new"}


def test_the_working_folder_and_what_is_read_are_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base").mkdir()
    with pytest.raises(ValueError, match="is or holds .*base"):
        check_output(tmp_path / "base", False, (tmp_path / "base",))
    monkeypatch.chdir(tmp_path / "base")
    with pytest.raises(ValueError, match="choose another folder"):
        check_output(Path("."), True)
    check_output(tmp_path / "new", False, (tmp_path / "base",))
