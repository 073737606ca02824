"""`peft-fps compare`, against Python sets and dictionaries."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peft_fps import Selection
from tests.cli.saved import WEIGHTS, check_user_error, edit_tensors, run, save_adapted
from tests.support.helpers import fill, layers_of, selected_columns, tiny_mlp, tiny_vit


Entries = dict[tuple[str, int, int], float]


def entries(model: nn.Module) -> Entries:
    """Value of every entry."""
    found = {}
    for path, layer in layers_of(model).items():
        values = iter(layer.fps_values["default"].tolist())
        for neuron, columns in enumerate(selected_columns(layer)):
            found |= {(path, neuron, column): next(values) for column in columns}
    return found


def jaccard(one: Any, other: Any) -> float:
    return len(set(one) & set(other)) / len(set(one) | set(other))


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("sides")
    first = save_adapted(tiny_vit(), folder / "a", per_neuron=3)
    second = save_adapted(tiny_vit(), folder / "b", per_neuron=4, granularity="model", bias="none")
    fill(second, seed=2)
    second.save_pretrained(folder / "b")
    Selection.of(first).save(folder / "a.safetensors")
    return {"folder": folder, "first": entries(first), "second": entries(second)}


def test_adapters_are_compared_entry_by_entry(sides: dict[str, Any]) -> None:
    folder, first, second = sides.values()
    result = run("compare", folder / "a", folder / "b", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    both = set(first) & set(second)
    assert 0 < len(both) < len(first)
    assert found["jaccard"] == pytest.approx(jaccard(first, second))
    assert (found["shared"], found["either"]) == (len(both), len(set(first) | set(second)))
    assert [found[side]["entries"] for side in ("first", "second")] == [len(first), len(second)]
    differences = [abs(first[entry] - second[entry]) for entry in both]
    signs = [(first[entry] > 0) == (second[entry] > 0) for entry in both]
    assert found["values"]["mean_difference"] == pytest.approx(sum(differences) / len(both), rel=1e-5)
    assert found["values"]["largest_difference"] == pytest.approx(max(differences), rel=1e-5)
    sizes = [(abs(first[entry]) + abs(second[entry])) / 2 for entry in both]
    assert found["values"]["mean_size"] == pytest.approx(sum(sizes) / len(both), rel=1e-5)
    assert found["values"]["same_sign"] == pytest.approx(sum(signs) / len(both))
    for row in found["modules"]:
        mine, others = ({e for e in side if e[0] == row["module"]} for side in (first, second))
        assert (row["first"], row["second"], row["shared"]) == (len(mine), len(others), len(mine & others))
        assert row["jaccard"] == pytest.approx(jaccard(mine, others) if mine | others else 1.0)
        assert row["values"]["shared"] == len(mine & others)
    assert found["differing_settings"] == {
        "per_neuron": [3, 4],
        "granularity": ["neuron", "model"],
        "bias": ["all", "none"],
    }
    assert found["same_base"] is True


def test_a_selection_equals_the_adapter_it_was_taken_from(sides: dict[str, Any]) -> None:
    folder = sides["folder"]
    found = json.loads(run("compare", folder / "a.safetensors", folder / "a", "--json").stdout)
    assert [found[side]["kind"] for side in ("first", "second")] == ["selection", "adapter"]
    assert found["jaccard"] == 1.0
    assert found["values"] is None
    assert found["same_base"] is True
    assert found["differing_settings"] == {}


def test_tables_and_a_picture_are_for_reading(sides: dict[str, Any], tmp_path: Path) -> None:
    folder, first, second = sides.values()
    result = run("compare", folder / "a", folder / "b", "--picture", tmp_path / "overlap.png")
    assert result.exit_code == 0, result.output
    for text in ("vit.layers.1.mlp.fc2", f"{jaccard(first, second):.4f}", "A: 'neuron', B: 'model'", "the same"):
        assert text in result.stdout
    assert (tmp_path / "overlap.png").read_bytes().startswith(b"\x89PNG")


def test_modules_of_one_side_count_as_not_shared(tmp_path: Path) -> None:
    whole = save_adapted(tiny_mlp(), tmp_path / "whole", target_modules=["first", "last"])
    part = save_adapted(tiny_mlp(), tmp_path / "part", target_modules=["first"])
    found = json.loads(run("compare", tmp_path / "whole", tmp_path / "part", "--json").stdout)
    assert (found["only_in_first"], found["only_in_second"]) == (["last"], [])
    assert found["jaccard"] == pytest.approx(jaccard(entries(whole), entries(part)))
    assert found["same_base"] is False  # a fingerprint is of the targeted weights
    assert "only in A" in run("compare", tmp_path / "whole", tmp_path / "part").stdout


def test_what_cannot_be_compared_is_refused(sides: dict[str, Any], tmp_path: Path) -> None:
    folder = sides["folder"]
    save_adapted(tiny_mlp(), tmp_path / "small", target_modules=["first"])
    save_adapted(tiny_mlp(inputs=11), tmp_path / "wide", target_modules=["first"])
    save_adapted(tiny_mlp(), tmp_path / "last", target_modules=["last"])
    shapes = check_user_error(run("compare", tmp_path / "small", tmp_path / "wide"))
    assert "first: found 12 neurons with 11 inputs" in shapes
    assert "no module in common" in check_user_error(run("compare", tmp_path / "small", tmp_path / "last"))
    assert "no such file or folder" in check_user_error(run("compare", folder / "a", tmp_path / "nowhere"))
    weights = folder / "a" / WEIGHTS
    assert "expected a file that Selection.save has written" in check_user_error(run("compare", weights, weights))
    edit_tensors(tmp_path / "last", {"last.fps_values": torch.full((8,), torch.nan)})
    damaged = check_user_error(run("compare", tmp_path / "last", tmp_path / "last"))
    assert "last is damaged: entries" in damaged
    check_user_error(run("compare", folder / "a"), code=2)
