import dataclasses
import math

import pytest
import torch
from torch import nn

from peft_fps.benchmarks.cost.methods import columns_used, fps
from peft_fps.benchmarks.cost.random_models import (
    NAMED,
    batches,
    build_model,
    copy_model,
    decoder,
    largest_weight,
    spread_gains,
)
from peft_fps.benchmarks.cost.workload import Workload


@pytest.mark.parametrize(
    ("name", "parameters"),
    # embedding, position and class token, 12 d² + 13 d per layer (d = width, MLP 4 d), last norm, head of 100
    [
        ("vit-b16", 85_798_656 + 768 * 100 + 100),
        ("vit-l16", 303_301_632 + 1024 * 100 + 100),
        ("vit-ti16-112px", 5_524_416 - (196 - 49) * 192 + 192 * 100 + 100),
    ],
)
def test_vits_have_the_published_sizes(name, parameters):
    layers, build = NAMED[name]
    with torch.device("meta"):
        model = build(layers)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize(("name", "least", "most"), [("decoder-0.5b", 0.5e9, 0.6e9), ("decoder-1b", 1e9, 1.2e9)])
def test_decoders_have_the_parameters_that_their_names_say(name, least, most):
    layers, build = NAMED[name]
    with torch.device("meta"):
        model = build(layers)
    assert least <= sum(parameter.numel() for parameter in model.parameters()) <= most


def test_gains_are_log_normal_and_multiply_rows():
    layer, norm, other = nn.Linear(3, 20_000), nn.LayerNorm(20_000), nn.Linear(3, 4)
    model = nn.ModuleDict({"fc1": layer, "norm": norm, "fc2": other})
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    spread_gains(model)
    for found in (norm.weight.log(), (layer.weight / before["fc1.weight"]).log()[:, 0]):
        assert found.mean().item() == pytest.approx(0, abs=0.02)
        assert found.std().item() == pytest.approx(0.3, abs=0.02)
    ratios = layer.weight / before["fc1.weight"]
    torch.testing.assert_close(ratios, ratios[:, :1].expand(-1, 3))
    for name in ("fc1.bias", "norm.bias", "fc2.weight", "fc2.bias"):
        assert torch.equal(model.get_parameter(name), before[name])


def test_gains_reach_a_decoder():
    with torch.device("meta"):
        names = [name for name, _ in decoder(1).named_modules()]
    assert sum(name.endswith(("v_proj", "up_proj", "norm", "layernorm")) for name in names) == 5


def test_named_models_are_the_same_every_time():
    quick = Workload(quick=True)
    first, second = build_model(quick), build_model(quick)
    assert len(first.vit.layers) == 2
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def test_an_unknown_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="vit-l16.*could not be loaded"):
        build_model(Workload(model=str(tmp_path)))


def test_copies_share_memory_and_nothing_else(base):
    base.requires_grad_(False)
    twin = copy_model(base)
    twin.classifier.requires_grad_(True)
    for (name, one), other in zip(base.named_parameters(), twin.parameters(), strict=True):
        assert one is not other
        assert one.data_ptr() == other.data_ptr(), name
        assert not one.requires_grad


def test_batches_of_images(base):
    first, second = batches(base, 3, count=2)
    assert first["pixel_values"].shape == (3, 3, 32, 32)
    assert not torch.equal(first["pixel_values"], second["pixel_values"])
    assert set(first["labels"].tolist()) <= set(range(10))
    assert torch.equal(batches(base, 3)[0]["pixel_values"], first["pixel_values"])


def test_largest_weight(base):
    assert largest_weight(base) == max(32 * 48, 32 * 3 * 8 * 8) * 4


def test_selections_use_some_columns_and_not_all(workload):
    used = columns_used(fps(build_model(dataclasses.replace(workload, model="vit-b16")), workload))
    assert set(used) == {"projection", "q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"}
    for kind in ("q_proj", "v_proj", "o_proj", "fc1", "fc2"):
        assert 0.1 < used[kind] < 0.9, kind
    assert all(math.isfinite(share) and 0 < share <= 1 for share in used.values())
