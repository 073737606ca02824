"""Sparse tensors and tensors saved whole are told apart by their keys, each counted once."""

from typing import Any

import pytest
import torch

from peft_fps.checkpoint import Contents


ONE, TWO, THREE = torch.ones(1), torch.full((1,), 2.0), torch.full((1,), 3.0)


def test_modules_and_tensors_saved_whole() -> None:
    found = Contents.of(
        [
            ("base_model.model.vit.layers.0.q_proj.fps_values", ONE),
            ("vit.layers.0.q_proj.fps_columns", TWO),
            ("base_model.model.classifier.weight", THREE),
            ("classifier.bias", ONE),
        ]
    )
    assert found.modules == {"vit.layers.0.q_proj": {"fps_values": ONE, "fps_columns": TWO}}
    assert found.wholes == {"classifier.weight": THREE, "classifier.bias": ONE}


def test_a_file_without_tensors() -> None:
    assert Contents.of([]) == Contents({}, {})


@pytest.mark.parametrize("name", ["fps_scale", "fps_", "fps_values2"])
def test_an_unknown_sparse_tensor_stays_with_its_module(name: str) -> None:
    """Validation refuses it by its module, and does not take it for a part of a head."""
    assert Contents.of([(f"last.{name}", ONE)]).modules == {"last": {name: ONE}}


@pytest.mark.parametrize("key", ["last.fps_values.default", "last.my_fps_values", "fps_values_.last", "fps.last"])
def test_a_key_with_the_prefix_elsewhere_is_no_sparse_tensor(key: str) -> None:
    assert Contents.of([(key, ONE)]) == Contents({}, {key: ONE})


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("a.b.fps_values", "a.b: the adapter file holds fps_values twice, expected it once.*fetch or save it again"),
        ("head.weight", "head.weight: the adapter file holds this tensor twice, expected it once.*save it again"),
    ],
)
@pytest.mark.parametrize("second", ["", "base_model.model."])
def test_a_tensor_that_is_there_twice_is_refused(key: str, says: str, second: str) -> None:
    keyed: Any = [(f"base_model.model.{key}", ONE), ("a.b.fps_bias", ONE), (second + key, TWO)]
    with pytest.raises(ValueError, match=f"^{says}"):
        Contents.of(keyed)
