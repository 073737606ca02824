"""Every derived task on small sources, whose splits are told apart by their blue."""

import io
import json
from functools import lru_cache

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from peft_fps.benchmarks.transfer import derived_tasks
from peft_fps.benchmarks.transfer.derived_tasks import DERIVED, DIGITS, derive
from peft_fps.cli.app import app
from peft_fps.vision.labelled_images import load_images


SOURCES = ("dtd10", "eth80_azimuth", "flowers102", "omniglot100", "rsscn7", "tinyin_size")
COUNTS = {"train": 90, "validation": 9, "test": 90}
BLUE = {"train": 40, "validation": 120, "test": 200}
"""What blue is in a split, within 15."""
HELD = 12
"""Images of a split of a source."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    for index, name in enumerate(SOURCES):
        for part, blue in BLUE.items():
            for number in range(HELD):
                rng = np.random.default_rng([index, blue, number])
                levels = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
                levels[..., 2] = blue + rng.integers(-15, 16, (6, 6))
                if name == "omniglot100":
                    levels = (
                        np.where(np.arange(36).reshape(6, 6, 1) == 14 + number, 0, 255).astype(np.uint8).repeat(3, 2)
                    )
                folder = root / name / part / f"class{number % 2}"
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(levels.repeat(5, 0).repeat(5, 1).repeat(1, 2)).save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="module", autouse=True)
def loaded_once():
    """Reading the sources takes longer than all else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(derived_tasks, "load_images", lru_cache(load_images))
        yield


@pytest.fixture(scope="module")
def made(sources, tmp_path_factory):
    output = tmp_path_factory.mktemp("derived")
    derive(sources, output, 3, COUNTS)
    return output


def split_of(folder, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Levels `(images, height, width, 3)` and labels."""
    rows = pq.read_table(folder / f"{part}.parquet").to_pylist()
    images = [np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))) for row in rows]
    return np.stack(images).astype(int), np.array([row["label"] for row in rows])


@pytest.mark.parametrize("name", DERIVED)
def test_a_task_reads_as_others_do_and_its_classes_are_balanced(name, made):
    data = load_images(str(made / name), seed=0)
    assert data.classes == list(DERIVED[name].classes)
    for part, count in COUNTS.items():
        labels = getattr(data, part).labels
        numbers = np.bincount(labels, minlength=len(data.classes))
        assert len(labels) == count
        assert numbers.max() - numbers.min() <= 1
    meta = json.loads((made / name / "meta.json").read_text())
    assert (meta["task"], meta["group"], meta["seed"]) == (name, "structured", 3)


# the other one turns hues
@pytest.mark.parametrize("name", ["eth80_rotation", "tinyin_foreign_part", "omniglot_counting", "digits_distance"])
@pytest.mark.parametrize("part", BLUE)
def test_images_come_from_sources_of_the_same_split(name, part, made):
    blue = split_of(made / name, part)[0][..., 2]
    own = np.abs(blue - BLUE[part]) <= 25  # interpolation overshoots
    others = {other: np.abs(blue - value) <= 25 for other, value in BLUE.items() if other != part}
    if name == "eth80_rotation":
        own |= blue == 127
        others = {other: near & (blue != 127) for other, near in others.items()}
    assert own.mean() > 0.75
    objects = 0 if name in ("eth80_rotation", "tinyin_foreign_part") else 0.1
    assert all(near.mean() <= objects + 0.02 for near in others.values())


def test_every_source_image_is_used_before_any_is_used_again(sources, monkeypatch, tmp_path):
    seen: dict[tuple[str, int], list[int]] = {}

    def noted(name, task):
        def make(label, row, splits, rng):
            seen.setdefault((name, id(splits)), []).append(row)
            assert {source: len(split) for source, split in splits.items()}.keys() == set(task.sources)
            return Image.new("RGB", (4, 4))

        return derived_tasks.DerivedTask(task.what, task.classes, task.sources, make)

    chosen = {name: noted(name, task) for name, task in DERIVED.items() if DIGITS not in task.sources}
    monkeypatch.setattr(derived_tasks, "DERIVED", chosen)
    derive(sources, tmp_path, 0, dict.fromkeys(COUNTS, 2 * HELD))
    for rows in seen.values():
        assert sorted(rows[:HELD]) == list(range(HELD))


@pytest.mark.parametrize("name", DERIVED)
def test_a_linear_probe_of_the_frame_is_at_chance(name, made):
    parts = {part: split_of(made / name, part) for part in ("train", "test")}
    classes = len(DERIVED[name].classes)
    x = {}
    for part, (levels, _) in parts.items():
        frame = [levels[:, 0, ::8], levels[:, -1, ::8], levels[:, ::8, 0], levels[:, ::8, -1]]
        x[part] = np.concatenate([side.reshape(len(levels), -1) for side in frame], 1) / 128 - 1
    train, test = (np.c_[x[part], np.ones(len(x[part]))] for part in ("train", "test"))
    wanted = np.eye(classes)[parts["train"][1]]
    # ridge regression by its dual form
    weights = train.T @ np.linalg.solve(train @ train.T + 10 * np.eye(len(train)), wanted)
    accuracy = ((test @ weights).argmax(1) == parts["test"][1]).mean()
    chance = 1 / classes
    assert abs(accuracy - chance) < 3.5 * np.sqrt(chance * (1 - chance) / len(test))


@pytest.mark.parametrize("name", sorted(set(DERIVED) - {"tinyin_foreign_part"}))
def test_classes_have_the_same_frame_for_the_same_random_numbers(name, sources):
    task = DERIVED[name]
    splits = {
        source: load_images(None if source == DIGITS else str(sources / source), 0).train for source in task.sources
    }
    frames = []
    for label in range(len(task.classes)):
        levels = np.asarray(task.make(label, 4, splits, np.random.default_rng(5)))
        frames.append(np.concatenate([levels[0], levels[-1], levels[:, 0], levels[:, -1]]))
    backgrounds = {frame.tobytes() for frame in frames}
    # after a pair of digits is placed, its background is drawn: as many numbers for every class
    assert len(backgrounds) == 1


def test_the_same_seed_gives_the_same_bytes(sources, tmp_path):
    files = {}
    for folder, seed in (("one", 3), ("again", 3), ("other", 4)):
        derive(sources, tmp_path / folder, seed, dict.fromkeys(COUNTS, 3))
        inside = tmp_path / folder
        files[folder] = {file.relative_to(inside): file.read_bytes() for file in inside.rglob("*") if file.is_file()}
    assert len(files["one"]) == 4 * len(DERIVED)
    assert files["one"] == files["again"]
    assert all(files["other"][path] != content for path, content in files["one"].items())


def test_missing_sources_and_folders_that_are_taken_are_named(sources, tmp_path):
    (tmp_path / "tasks" / "dtd10").mkdir(parents=True)
    arguments = ["benchmark", "derive", "--output", str(tmp_path), "--tasks"]
    ended = CliRunner().invoke(app, [*arguments, str(tmp_path / "tasks")])
    assert ended.exit_code == 1
    assert "which lacks eth80_azimuth, flowers102, omniglot100, rsscn7, tinyin_size" in ended.stderr
    (tmp_path / "digits_distance").mkdir()
    ended = CliRunner().invoke(app, [*arguments, str(sources)])
    assert ended.exit_code == 1
    assert "which holds digits_distance: choose another folder" in ended.stderr


def test_the_command_makes_all_tasks(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(derived_tasks, "derive", lambda tasks, output, seed: [output / f"{tasks.name} {seed}"])
    arguments = ["benchmark", "derive", "--tasks", str(sources), "--output", str(tmp_path), "--seed", "7"]
    ended = CliRunner().invoke(app, arguments)
    assert ended.exit_code == 0, ended.output
    assert f"{sources.name} 7" in ended.stdout.replace("\n", "")
    assert "--tasks" in CliRunner().invoke(app, ["benchmark", "derive", "--help"]).stdout
