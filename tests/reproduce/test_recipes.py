"""The numbers are those of GPS's scripts and of the papers' tables, written down here once more."""

import pytest

from peft_fps.reproduce.recipes import (
    TASKS,
    find_task,
    published_settings,
    recipe_table,
    trained_parameters,
    training_images,
)


TRAINED = {
    "fgvc": {"cub": 404_936, "nabirds": 2_184_747, "flowers": 245_862, "cars": 1_490_116, "dogs": 259_704},
    "vtab-1k": {
        **{"caltech101": 245_862, "cifar100": 244_324, "clevr_count": 173_576, "clevr_dist": 172_038},
        **{"diabetic_retinopathy": 171_269, "dmlab": 172_038, "dsprites_loc": 179_728, "dsprites_ori": 179_728},
        **{"dtd": 203_567, "eurosat": 175_114, "flowers102": 245_862, "kitti": 170_500, "patch_camelyon": 252_674},
        **{"pets": 195_877, "resisc45": 202_029, "smallnorb_azi": 181_266, "smallnorb_ele": 174_345},
        **{"sun397": 472_717, "svhn": 175_114},
    },
}
VIT_B_16 = 85_798_656


@pytest.mark.parametrize("benchmark", ["fgvc", "vtab-1k"])
def test_classes_and_k_give_the_known_number_of_trained_parameters(benchmark):
    assert {name: trained_parameters(task) for name, task in TASKS[benchmark].items()} == TRAINED[benchmark]


@pytest.mark.parametrize(("benchmark", "percent"), [("vtab-1k", 0.2446), ("fgvc", 1.069)])
def test_mean_share_of_trained_parameters(benchmark, percent):
    shares = [100 * trained_parameters(task) / VIT_B_16 for task in TASKS[benchmark].values()]
    assert sum(shares) / len(shares) == pytest.approx(percent, abs=5e-4)


@pytest.mark.parametrize(
    ("benchmark", "method", "mean"),
    [("vtab-1k", "gps", 75.2), ("vtab-1k", "fps", 74.2), ("fgvc", "gps", 91.8), ("fgvc", "fps", 91.3)],
)
def test_printed_accuracies_have_the_printed_mean(benchmark, method, mean):
    accuracies = [task.published[method] for task in TASKS[benchmark].values()]
    assert sum(accuracies) / len(accuracies) == pytest.approx(mean, abs=0.05 + 1e-9)


def test_what_is_special_to_a_benchmark():
    assert {task.ema for task in TASKS["vtab-1k"].values()} == {None}
    assert {task.ema for task in TASKS["fgvc"].values()} == {0.9998, 0.99}
    assert [name for name, task in TASKS["vtab-1k"].items() if task.per_neuron == 2] == ["patch_camelyon"]
    assert sum(task.drop_path > 0 for tasks in TASKS.values() for task in tasks.values()) == 10


@pytest.mark.parametrize(
    ("benchmark", "name", "expected"),
    [
        ("vtab-1k", "cifar100", {"learning_rate": 1e-2, "batch_size": 32, "per_neuron": 1, "augmentation": False}),
        ("vtab-1k", "smallnorb_ele", {"learning_rate": 3e-4, "batch_size": 32, "drop_path": 0.2, "ema": None}),
        ("fgvc", "dogs", {"learning_rate": 1e-4, "batch_size": 64, "drop_path": 0.0, "augmentation": True}),
        ("fgvc", "nabirds", {"per_neuron": 20, "drop_path": 0.1, "ema": 0.9998, "epochs": 100, "seed": 42}),
    ],
)
def test_settings_of_a_task(benchmark, name, expected):
    settings = published_settings(find_task(benchmark, name))
    assert {key: settings[key] for key in expected} == expected
    assert settings["model"] == "timm/vit_base_patch16_224.augreg_in21k"
    assert settings["image_size"] == 224


def test_training_images():
    vtab, fgvc = find_task("vtab-1k", "dtd"), find_task("fgvc", "cub")
    assert [training_images(vtab, on_all) for on_all in (False, True)] == [800, 1000]
    assert training_images(fgvc, True) is None


def test_an_unknown_task_is_answered_with_those_that_there_are():
    message = "'birds' is no task of FGVC, expected one of cub, nabirds, flowers, cars, do"
    with pytest.raises(ValueError, match=message):
        find_task("fgvc", "birds")


def test_table_has_a_line_for_every_task():
    lines = recipe_table().splitlines()
    assert len(lines) == 2 + 24
    assert len({line.count("|") for line in lines}) == 1
    assert "| FGVC `cub` | 200 | 2 | 32 | 0.003 | 0 | 0.9998 | 404,936 | 89.9, 89.5 |" in lines
    assert "| VTAB-1k `dmlab` | 6 | 1 | 16 | 0.0015 | 0.1 | – | 172,038 | 55.0, 54.8 |" in lines
