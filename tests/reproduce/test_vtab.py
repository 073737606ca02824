import pytest

from peft_fps.reproduce.vtab import read_vtab
from tests.reproduce.layouts import write_vtab


def test_rows_of_the_three_splits(tmp_path):
    folder = write_vtab(tmp_path / "task", train=5, validation=2, test=3)
    splits = read_vtab(folder, train_on_all=False)
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 5, "validation": 2, "test": 3}
    assert splits["train"][3].file == folder / "images/train800/003.png"
    assert [row.label for row in splits["train"]] == [0, 1, 0, 1, 0]
    assert splits["test"][2].where == f"{folder / 'test.txt'}, line 3"


def test_training_on_all_reads_the_joint_list(tmp_path):
    splits = read_vtab(write_vtab(tmp_path / "task", train=5, validation=2, test=3), train_on_all=True)
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 7, "test": 3}


def test_spaces_in_paths_and_empty_lines(tmp_path):
    folder = write_vtab(tmp_path / "task")
    (folder / "test.txt").write_text("images/a b.png 1\n\n  images/c.png   0 \n")
    rows = read_vtab(folder, train_on_all=False)["test"]
    assert [(row.file, row.label) for row in rows] == [(folder / "images/a b.png", 1), (folder / "images/c.png", 0)]
    assert rows[1].where.endswith("line 3")


def test_missing_lists_are_named_beside_what_is_there(tmp_path):
    folder = write_vtab(tmp_path / "task")
    for name in ("train800.txt", "val200.txt"):
        (folder / name).unlink()
    with pytest.raises(
        ValueError, match=r"lacks train800.txt, val200.txt: looked for .*test.txt, found images/, test"
    ) as e:
        read_vtab(folder, train_on_all=False)
    assert "train800val200.txt is there: --train-on-all" in str(e.value)
    assert len(read_vtab(folder, train_on_all=True)["train"]) == 18


@pytest.mark.parametrize("line", ["images/x.png", "images/x.png -1", "images/x.png cat", "3"])
def test_a_line_that_is_no_path_and_class_index(tmp_path, line):
    folder = write_vtab(tmp_path / "task")
    (folder / "val200.txt").write_text(f"images/val200/000.png 0\n{line}\n")
    with pytest.raises(ValueError, match=r"val200.txt, line 2: found .*expected an image path, a space and a class"):
        read_vtab(folder, train_on_all=False)
