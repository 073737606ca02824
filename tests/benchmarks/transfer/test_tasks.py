import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from peft_fps.benchmarks.transfer.tasks import GROUPS, group_of, load_task, rank, task_names
from tests.benchmarks.transfer.conftest import COUNTS, TASKS, picture


@pytest.mark.parametrize("name", TASKS)
def test_a_task_holds_its_images_as_the_model_takes_them(name, setting):
    task, (group, classes) = load_task(name, setting), TASKS[name]
    assert (task.name, task.group) == (name, group)
    assert task.classes == [f"class{label}" for label in range(classes)]
    assert list(task.splits) == list(COUNTS)
    for start, (split, count) in enumerate(COUNTS.items()):
        examples = [task.splits[split][row] for row in range(len(task.splits[split]))]
        assert [int(example["labels"]) for example in examples] == [c for c in range(classes) for _ in range(count)]
        for row, example in enumerate(examples):
            levels = picture(name, row // count, 100 * start + row % count)
            expected = torch.from_numpy(levels.astype(np.float32)).permute(2, 0, 1) / 255 * 2 - 1
            torch.testing.assert_close(example["pixel_values"], expected, atol=1e-5, rtol=0)


def test_a_task_is_prepared_once(setting):
    assert load_task("bright", setting) is load_task("bright", setting)


def test_a_base_model_attends_as_the_setting_says(setting):
    default, eager = (load_task("bright", replace(setting, attention=kind)).load_base(3) for kind in ("sdpa", "eager"))
    assert default.config._attn_implementation == "sdpa"
    assert eager.config._attn_implementation == "eager"
    torch.testing.assert_close(eager.state_dict(), default.state_dict(), atol=0, rtol=0)


def test_a_task_that_is_not_there(setting):
    with pytest.raises(ValueError, match="could not be read as a data set of images"):
        load_task("lunch", setting)


def write(folder, content):
    folder.mkdir(parents=True)
    if content is not None:
        (folder / "meta.json").write_text(content, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("content", "group"),
    [
        ('{"group": "natural"}', "natural"),
        ('{"group": "mine", "source": "here"}', "mine"),
        ("{}", "all"),
        ('{"group": 3}', "all"),
        ("[1]", "all"),
        (None, "all"),
    ],
)
def test_groups(tmp_path, content, group):
    assert group_of(write(tmp_path / "task", content)) == group


def test_a_group_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match="meta.json is no JSON"):
        group_of(write(tmp_path / "task", '{"group": '))


def test_tasks_stand_by_group_and_name(tmp_path):
    groups = {"d": "structured", "c": "natural", "b": "mine", "a": "specialised", "e": "natural", "f": None}
    for name, group in groups.items():
        write(tmp_path / name, None if group is None else json.dumps({"group": group}))
    (tmp_path / "README.md").write_text("no task", encoding="utf-8")
    assert task_names(tmp_path) == ["c", "e", "a", "d", "f", "b"]
    assert sorted(["mine", "all", *reversed(GROUPS)], key=rank) == [*GROUPS, "all", "mine"]


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_without_tasks(tmp_path, there):
    folder = tmp_path / "tasks"
    if there:
        folder.mkdir()
        (folder / "README.md").write_text("no task", encoding="utf-8")
    with pytest.raises(ValueError, match="--tasks is .*expected a folder with one folder of labelled images per task"):
        task_names(folder)
