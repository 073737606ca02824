"""Entries that something else has written to an adapter's tensors are told, whether they are used or saved."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from tests.support.helpers import adapted, layers_of, normal, tiny_mlp


WRITTEN = "something has written other entries to the tensors of adapter 'default'"


def mirrored(layer: Any) -> Tensor:
    """Other valid entries of the same number in each neuron."""
    last, counts = layer.shape.inputs - 1, layer.fps_row_counts["default"].tolist()
    return torch.cat([(last - row).flip(0) for row in layer.fps_columns["default"].split(counts)])


def rewrite(model: nn.Module) -> None:
    for layer in layers_of(model).values():
        layer.fps_columns["default"].copy_(mirrored(layer))


@pytest.mark.parametrize("ran", [True, False], ids=["used before", "not used before"])
@pytest.mark.parametrize("copied", [True, False], ids=["a copy", "the model"])
def test_other_entries_written_in_place_count_and_are_told_once(ran: bool, copied: bool) -> None:
    model, x = adapted(tiny_mlp()), normal(3, 10)
    if ran:
        model(x)
    model = copy.deepcopy(model) if copied else model
    rewrite(model)
    with pytest.warns(UserWarning, match=f"^first: {WRITTEN}.* `use_buffers=False`") as told:
        found = model(x)
    assert len(told) == 1
    loaded = adapted(tiny_mlp())
    loaded.load_state_dict(model.state_dict())
    torch.testing.assert_close(found, loaded(x))
    model(x)


@pytest.mark.parametrize("ran", [True, False])
def test_the_same_entries_written_in_place_are_no_news(ran: bool) -> None:
    model, x = adapted(tiny_mlp()), normal(3, 10)
    expected = model(x)
    other = copy.deepcopy(model)
    if ran:
        other(x)
    for own, layer in zip(layers_of(other).values(), layers_of(model).values(), strict=True):
        own.fps_columns["default"].copy_(layer.fps_columns["default"])
        own.fps_row_counts["default"].copy_(layer.fps_row_counts["default"])
    assert torch.equal(other(x), expected)


@pytest.mark.parametrize("average", [get_ema_avg_fn, get_ema_multi_avg_fn])
@pytest.mark.parametrize("decay", [0.9, 0.99, 0.999, 0.9999])
def test_averages_that_round_entries_are_told_and_others_are_not(average: Callable[..., Any], decay: float) -> None:
    model, x = adapted(tiny_mlp(60)), normal(3, 60)
    kind = "multi_avg_fn" if average is get_ema_multi_avg_fn else "avg_fn"
    averaged = AveragedModel(model, use_buffers=True, **{kind: average(decay)})
    for _ in range(3):
        averaged.update_parameters(model)
    pairs = zip(layers_of(averaged).values(), layers_of(model).values(), strict=True)
    tensors = ("fps_columns", "fps_row_counts")
    rounded = any(
        not torch.equal(getattr(own, name)["default"], getattr(layer, name)["default"])
        for own, layer in pairs
        for name in tensors
    )
    assert rounded == (decay in (0.9, 0.9999))  # what torch does to integers, in float32
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            assert torch.allclose(averaged(x), model(x), atol=1e-5) != rounded
            message = "".join(str(each.message) for each in told)
        except ValueError as error:
            message = str(error)
    assert ("`use_buffers=False`" in message) == rounded


def test_averages_of_parameters_alone_are_those_of_the_values() -> None:
    model, x = adapted(tiny_mlp()), normal(3, 10)
    averaged = AveragedModel(model, avg_fn=get_ema_avg_fn(0.5))
    averaged.update_parameters(model)
    expected = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "fps_values" in name:
                parameter.mul_(3)
                expected[name] *= 2
    averaged.update_parameters(model)
    for name, parameter in averaged.module.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name])
    averaged(x)


def test_entries_written_past_the_count_of_changes_are_not_saved(tmp_path: Path) -> None:
    model, x = adapted(tiny_mlp()), normal(3, 10)
    before = model(x)
    layer = layers_of(model)["last"]
    kept = layer.fps_columns["default"].clone()
    layer.fps_columns["default"].data.copy_(mirrored(layer))
    assert torch.equal(model(x), before)  # nothing tells the layer
    with pytest.raises(ValueError, match="^last: adapter 'default' has other entries in its tensors than it computes"):
        model.save_pretrained(tmp_path / "adapter")
    assert not list(tmp_path.rglob("*.safetensors"))
    layer.fps_columns["default"].data.copy_(kept)
    model.save_pretrained(tmp_path / "adapter")


def test_entries_written_in_place_and_not_used_are_told_when_they_are_saved(tmp_path: Path) -> None:
    model = adapted(tiny_mlp())
    model(normal(3, 10))
    rewrite(model)
    with pytest.warns(UserWarning, match=WRITTEN):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["fps_columns", "fps_row_counts"])
def test_a_state_dict_with_other_entries_is_not_saved(name: str, tmp_path: Path) -> None:
    model = adapted(tiny_mlp())
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "good", state_dict=state)
    state[next(key for key in state if "last" in key and name in key)] -= 1
    with pytest.raises(ValueError, match=f"^last: adapter 'default' has other {name} in the state dict than in the"):
        model.save_pretrained(tmp_path / "adapter", state_dict=state)
    assert not list((tmp_path / "adapter").rglob("*.safetensors"))
