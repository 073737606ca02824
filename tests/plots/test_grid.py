"""Where modules stand in a picture, by their paths alone."""

import numpy as np
import pytest

from peft_fps.plots.grid import arrange, shortened


def test_blocks_stand_by_number_whatever_the_order_of_the_paths() -> None:
    grid = arrange(f"model.layers.{number}.mlp.up_proj" for number in (1, 10, 0, 2))
    assert grid.blocks == [f"model.layers.{number}" for number in (0, 1, 2, 10)]
    assert grid.block_labels == ["0", "1", "2", "10"]
    assert grid.block_axis == "block (model.layers)"


def test_a_module_outside_any_block_has_a_row_and_a_column_of_its_own() -> None:
    grid = arrange(["vit.layers.0.mlp.fc1", "vit.embeddings.projection", "vit.layers.1.mlp.fc1"])
    assert grid.types == ["vit.embeddings.projection", "mlp.fc1"]
    assert grid.block_labels == ["none", "0", "1"]
    present = [[True, False, False], [False, True, True]]
    assert (~np.isnan(grid.matrix(lambda paths: 1.0)) == np.array(present)).all()


def test_further_numbers_are_one_type() -> None:
    experts = [f"model.layers.{block}.moe.experts.{expert}.w1" for block in range(2) for expert in range(3)]
    grid = arrange(experts)
    assert grid.types == ["moe.experts.*.w1"]
    assert grid.cells["moe.experts.*.w1", "model.layers.1"] == experts[3:]
    assert grid.of_type("moe.experts.*.w1") == experts


def test_lists_of_blocks_are_told_apart() -> None:
    paths = [f"model.{part}.block.{number}.wi" for part in ("encoder", "decoder") for number in range(2)]
    grid = arrange(paths)
    assert grid.block_labels == ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"]
    assert grid.block_axis == "block"


def test_elements_of_a_plain_sequential_share_a_row() -> None:
    grid = arrange(["0", "2"])
    assert grid.types == ["(element)"]
    assert grid.block_labels == ["0", "2"]


def test_without_any_block_there_is_one_column() -> None:
    grid = arrange(["first", "last"])
    assert (grid.types, grid.block_labels) == (["first", "last"], ["none"])


@pytest.mark.parametrize(
    ("label", "short"),
    [
        ("mlp.fc1", "mlp.fc1"),
        ("vit.embeddings.patch_embeddings.projection", "…patch_embeddings.projection"),
        ("a" * 40, "…" + "a" * 33),
    ],
)
def test_long_labels_keep_their_end(label: str, short: str) -> None:
    assert shortened(label) == short
    assert len(short) <= 34
