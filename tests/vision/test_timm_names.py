from pathlib import Path

import pytest

from peft_fps.benchmarks.transfer.cells import Setting
from peft_fps.vision.locations import check_locations, check_path, local_path
from peft_fps.vision.timm_names import TimmName, check_timm_name, timm_name


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("timm:resnet18", TimmName("resnet18", None)),
        ("timm:resnet18.a1_in1k", TimmName("resnet18.a1_in1k", None)),
        ("timm:resnet18@a/b@c.pth", TimmName("resnet18", Path("a/b@c.pth"))),
        ("timm/resnet18", None),
        ("resnet18", None),
    ],
)
def test_parts_of_a_value(value, expected):
    assert timm_name(value) == expected


def test_the_file_is_what_lies_on_this_machine(tmp_path):
    assert local_path(f"timm:resnet18@{tmp_path}/a.pth") == tmp_path / "a.pth"
    assert local_path("~/model") == Path.home() / "model"


@pytest.mark.parametrize("value", ["timm:", "timm:@weights.pth"])
def test_a_value_without_a_name(value):
    with pytest.raises(ValueError, match="expected timm:NAME or timm:NAME@FILE"):
        check_timm_name("--model", value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"there is no file .*none\.safetensors"):
        check_path("--model", f"timm:resnet18@{tmp_path}/none.safetensors")


@pytest.mark.usefixtures("without_timm")
def test_without_timm_the_command_to_install_it_is_told_before_anything_is_written(tmp_path):
    with pytest.raises(ImportError, match=r'timm:resnet18.*pip install "peft-fps\[reproduce\]"'):
        check_locations("timm:resnet18", None, tmp_path / "out", overwrite=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--base", "ADAPTER"])
def test_a_name_is_no_base_to_merge_into(option):
    with pytest.raises(ValueError, match=f"{option} is 'timm:resnet18'.*Give a folder"):
        check_path(option, "timm:resnet18")


def test_a_table_is_the_same_wherever_the_file_lies():
    here, there = (Setting(f"timm:resnet18@{folder}/a.pth", "tasks").comparable() for folder in ("/one", "/two"))
    assert here == there
    assert here["model"] == "timm:resnet18@a.pth"
    assert Setting("timm:resnet18", "tasks").comparable()["model"] == "timm:resnet18"
