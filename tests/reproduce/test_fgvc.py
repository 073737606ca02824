import json
import shutil

import pytest

from peft_fps.reproduce.fgvc import read_fgvc
from tests.reproduce.layouts import write_fgvc


def test_class_ids_are_numbered_in_ascending_order(tmp_path):
    folder = write_fgvc(tmp_path / "task", ids=(30, 7))
    splits = read_fgvc(folder, train_on_all=False)
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 12, "validation": 6, "test": 8}
    assert [row.label for row in splits["validation"]] == [1, 0, 1, 0, 1, 0]
    assert splits["validation"][1].file == folder / "images" / "val/001.png"
    assert splits["test"][0].where == f"{folder / 'test.json'}, 'test/000.png'"


def test_a_class_that_only_validation_has_counts(tmp_path):
    folder = write_fgvc(tmp_path / "task", ids=(3, 7))
    (folder / "val.json").write_text(json.dumps({"val/000.png": 5}))
    splits = read_fgvc(folder, train_on_all=False)
    assert [splits[split][0].label for split in ("train", "validation")] == [0, 1]
    assert splits["train"][1].label == 2


def test_training_on_all_joins_training_and_validation(tmp_path):
    splits = read_fgvc(write_fgvc(tmp_path / "task"), train_on_all=True)
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 18, "test": 8}
    assert [row.file.parent.name for row in splits["train"]] == ["train"] * 12 + ["val"] * 6


@pytest.mark.parametrize("name", ["", "Images"])
def test_where_the_images_stand(tmp_path, name):
    folder = write_fgvc(tmp_path / "task")
    shutil.move(folder / "images", tmp_path / "moved")
    shutil.copytree(tmp_path / "moved", folder / name, dirs_exist_ok=True)
    rows = read_fgvc(folder, train_on_all=False)["train"]
    assert rows[0].file == folder / name / "train/000.png"


def test_ids_written_as_text(tmp_path):
    folder = write_fgvc(tmp_path / "task", ids=("02", "10"))
    assert [row.label for row in read_fgvc(folder, train_on_all=False)["test"]][:2] == [0, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('["a.png"]', "val.json holds list, expected an object from image path to class id"),
        ("{}", "val.json holds dict"),
        ("{", "val.json is not JSON"),
        ('{"a.png": "cat"}', "val.json, 'a.png': the class id is 'cat', expected an integer"),
        ('{"a.png": -1}', "the class id is -1"),
        ('{"a.png": true}', "the class id is True"),
    ],
)
def test_files_of_another_kind(tmp_path, content, message):
    folder = write_fgvc(tmp_path / "task")
    (folder / "val.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_fgvc(folder, train_on_all=False)


def test_missing_files_and_unknown_test_classes(tmp_path):
    folder = write_fgvc(tmp_path / "task")
    (folder / "test.json").write_text('{"test/000.png": 4}')
    with pytest.raises(ValueError, match=r"test.json, 'test/000.png': the class id is 4, expected one of the 2 of tr"):
        read_fgvc(folder, train_on_all=False)
    (folder / "val.json").unlink()
    with pytest.raises(ValueError, match=r"lacks val.json: looked for .*, found images/, test.json, train.json\."):
        read_fgvc(folder, train_on_all=True)
