import math

import pytest
import torch
from torch import nn

from peft_fps.benchmarks.cost.methods import METHODS, columns_used, fps
from peft_fps.benchmarks.cost.training_step import Training
from tests.support.helpers import layers_of


WIDTH, HIDDEN, LAYERS, CLASSES, PATCH = 32, 48, 2, 10, 3 * 8 * 8
HEAD = WIDTH * CLASSES + CLASSES
LINEAR = LAYERS * [(WIDTH, WIDTH)] * 4 + LAYERS * [(HIDDEN, WIDTH), (WIDTH, HIDDEN)]
NEURONS = WIDTH + sum(neurons for neurons, _ in LINEAR)
SPARSE = 6 * NEURONS + NEURONS - LAYERS * WIDTH + HEAD  # but for the biases of keys
EXPECTED = {
    "full": None,
    "floor": HEAD,
    "masks": WIDTH * PATCH + WIDTH + sum(n * m + n for n, m in LINEAR) + HEAD,
    "lora": sum(16 * (n + m) for n, m in LINEAR) + HEAD,
    "shira": sum(4 * (n + m) for n, m in LINEAR) + HEAD,
    "supertuning": sum(int(n * m * 0.0077) for n, m in LINEAR) + HEAD,
    "fps": SPARSE,
    "fps-pytorch": SPARSE,
    "fps-columns": SPARSE,
    "fps-bfloat16": SPARSE,
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_what_it_should_and_takes_a_step(name, base, workload):
    before = {key: value.clone() for key, value in base.state_dict().items()}
    training = Training(name, base, workload)
    trained = {key: p for key, p in training.model.named_parameters() if p.requires_grad}
    expected = EXPECTED[name] or sum(parameter.numel() for parameter in base.parameters())
    assert sum(parameter.numel() for parameter in trained.values()) == pytest.approx(expected, abs=len(LINEAR))
    assert math.isfinite(training.loss().item())
    training.step()
    states = training.optimizer.state
    assert {id(parameter) for parameter in states} == {id(parameter) for parameter in trained.values()}
    assert all(parameter.grad is None for parameter in training.model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())


def test_masks_leave_six_gradients_per_neuron(base, workload):
    training = Training("masks", base, workload)
    training.loss().backward()
    for name, module in training.model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and name != "classifier":
            left = module.weight.grad.flatten(1) != 0
            best = torch.zeros_like(left)
            for row, weights in enumerate(module.weight.flatten(1).abs().tolist()):
                for column in sorted(range(len(weights)), key=weights.__getitem__)[-6:]:
                    best[row, column] = True
            assert not (left & ~best).any()
            assert left.float().mean() > 0.5 * best.float().mean()


def test_the_floor_computes_input_gradients_down_to_the_embeddings(base, workload):
    training = Training("floor", base, workload)
    reached = []

    def watch(module, inputs, output):
        output.register_hook(lambda gradient: reached.append(gradient.shape))

    training.model.vit.embeddings.patch_embeddings.register_forward_hook(watch)
    training.step()
    assert reached == [torch.Size([2, 16, WIDTH])]


def test_variants_differ_in_what_they_keep(base, workload):
    kept = {
        name: METHODS[name].build(base, workload).peft_config["default"].saved_inputs
        for name in METHODS
        if "-" in name
    }
    assert kept == {
        "fps-pytorch": "rebuild",
        "fps-columns": "columns",
        "fps-bfloat16": "bfloat16",
    }


@pytest.mark.parametrize("bias", ["all", "with_norms"])
def test_columns_used_are_counted_per_kind_of_layer(base, workload, bias):
    model = fps(base, workload, bias=bias)
    expected = {}
    for path, layer in layers_of(model).items():
        if "norm" in path:  # trains a bias alone
            continue
        share = len(set(layer.fps_columns["default"].tolist())) / layer.base_layer.weight[0].numel()
        expected.setdefault(path.split(".")[-1], []).append(share)
    assert any("norm" in path for path in layers_of(model)) == (bias == "with_norms")
    assert columns_used(model) == {kind: pytest.approx(sum(s) / len(s)) for kind, s in expected.items()}
