import logging
from dataclasses import replace

import numpy as np
import pytest

from peft_fps.reproduce.recipes import find_task
from peft_fps.reproduce.task_images import load_task
from tests.reproduce.layouts import write_fgvc, write_vtab
from tests.vision.conftest import picture


TWO = replace(find_task("vtab-1k", "pets"), classes=2)


@pytest.mark.parametrize("place", ["", "pets", "oxford_iiit_pet"])
def test_a_tasks_folder_or_the_folder_above(tmp_path, place, caplog):
    folder = write_vtab(tmp_path / place / ".")
    data = load_task(str(tmp_path), TWO, seed=0)
    assert data.source == str(tmp_path / place if place else tmp_path)
    assert data.classes == ["0", "1"]
    assert [len(data.train), len(data.validation), len(data.test)] == [12, 6, 8]
    assert data.test.labels == [0, 1] * 4
    expected = picture(1, 12 + 6 + 3)
    assert np.array_equal(np.array(data.test.images[3]["image"]), np.array(expected))
    assert not caplog.records
    assert folder.is_dir()


def test_fgvc_files_of_a_task(tmp_path):
    task = replace(find_task("fgvc", "cub"), classes=2)
    write_fgvc(tmp_path / "CUB_200_2011")
    data = load_task(str(tmp_path), task, seed=0, train_on_all=True)
    assert data.validation is None
    assert [len(data.train), len(data.test)] == [18, 8]


def test_another_number_of_classes_is_a_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        data = load_task(str(write_vtab(tmp_path / "x", classes=3)), find_task("vtab-1k", "pets"), seed=0)
    assert len(data.classes) == 3
    assert f"{tmp_path / 'x'} has 3 classes, the recipe of pets is for 37" in caplog.text


def test_a_missing_image_is_named_with_its_line(tmp_path):
    folder = write_vtab(tmp_path / "x")
    for number in (2, 5):
        (folder / f"images/test/{number:03}.png").unlink()
    with pytest.raises(ValueError, match=r"test.txt, line 3: there is no image .*test/002.png; 2 of the 8 listed ima"):
        load_task(str(folder), TWO, seed=0)


def test_a_label_that_neither_recipe_nor_training_knows(tmp_path):
    folder = write_vtab(tmp_path / "x")
    text = (folder / "test.txt").read_text().splitlines()
    (folder / "test.txt").write_text("\n".join([*text[:4], "images/test/004.png 2"]))
    with pytest.raises(ValueError, match=r"test.txt, line 5: the label is 2, expected 0 to 1\."):
        load_task(str(folder), TWO, seed=0)
    assert len(load_task(str(folder), find_task("vtab-1k", "pets"), seed=0).classes) == 3


def test_an_empty_list(tmp_path):
    folder = write_vtab(tmp_path / "x")
    (folder / "val200.txt").write_text("")
    with pytest.raises(ValueError, match="The validation split lists no images"):
        load_task(str(folder), TWO, seed=0)


def test_first_images_of_each_split(tmp_path):
    data = load_task(str(write_vtab(tmp_path / "x")), TWO, seed=0).first(7)
    assert [len(data.train), len(data.validation), len(data.test)] == [7, 6, 7]
    assert data.train.labels == [0, 1, 0, 1, 0, 1, 0]
    assert len(data.train.images) == 7


@pytest.mark.parametrize("train_on_all", [False, True])
def test_a_folder_with_a_subfolder_per_class(image_folder, train_on_all):
    data = load_task(str(image_folder), TWO, seed=0, train_on_all=train_on_all)
    assert data.classes == ["blue", "red"]
    assert len(data.train) == len(data.train.images) == (22 if train_on_all else 16)
    assert (data.validation is None) == train_on_all
    assert len(data.test) == 8
    assert sorted(data.train.labels).count(0) == len(data.train) // 2


def test_a_folder_with_none_of_it(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(ValueError, match=r"none of train800.txt, val200.txt, test.txt, .* was found; and --data is"):
        load_task(str(tmp_path), TWO, seed=0)
