"""Candidates for training, against dense layers, plain models and groups by name."""

from dataclasses import replace

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import TrainingArguments

from peft_fps.benchmarks.transfer import cell_run
from peft_fps.benchmarks.transfer.cells import Cell
from peft_fps.benchmarks.transfer.training_candidates import DEFAULT, TRAINING_CANDIDATES, TrainingCandidate, add_scale
from peft_fps.config import FPSConfig
from peft_fps.vision.finetune_options import FinetuneOptions
from peft_fps.vision.preparation import training_callback
from tests.support.helpers import (
    adapted,
    dense_reference,
    drop_path_rates,
    image_batches,
    images,
    normal,
    tiny_conv,
    tiny_vit,
    weighted_of,
)


LABELS = torch.tensor([0, 1, 2, 3])


def trained(candidate: TrainingCandidate, share: float = 0.25) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    base = tiny_vit()
    model = get_peft_model(base, candidate.build(base, share, 0))
    model.calibrate(image_batches(1), progress=False)
    candidate.prepare(model)
    return model, {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


CANDIDATES = {"fps-default": DEFAULT} | {name: candidate for name, (_, candidate) in TRAINING_CANDIDATES.items()}


@pytest.mark.parametrize("name", CANDIDATES)
def test_all_that_is_trained_counts_in_the_budget(name):
    base, (_, found) = tiny_vit(), trained(CANDIDATES[name])
    backbone = sum(p.numel() for key, p in base.named_parameters() if "classifier" not in key)
    spent = sum(p.numel() for key, p in found.items() if "classifier" not in key)
    assert 0 <= int(0.25 * backbone) - spent < 1 + 2 * 6  # less than one entry per module


def test_what_is_trained_and_what_is_frozen():
    names = {name: set(trained(candidate)[1]) for name, (_, candidate) in TRAINING_CANDIDATES.items()}
    standard = names["try-clip"]
    norms = names["try-norms-biases"] - standard
    assert len(norms) == 5
    assert all("layernorm" in name and "fps_bias" in name for name in norms)
    weights = {name.replace("fps_bias.default", "base_layer.weight") for name in norms}
    assert names["try-norm-weights-biases"] - standard == norms | weights
    scales = names["try-scales-biases"] - standard
    assert len(scales) == 1 + 2 * 6
    assert scales == names["try-scales"] - {name for name in standard if "fps_bias" not in name}


def test_the_default_trains_as_the_command_does():
    model, _ = trained(DEFAULT)
    callback = training_callback(FinetuneOptions(), model, 0.03)
    assert {"bias_lr": 0.03 * DEFAULT.bias_rate, "head_lr": 0.03 * DEFAULT.head_rate} == callback.rates
    assert DEFAULT.centred is callback.centred is None
    assert DEFAULT.recipe == {"adam_beta2": FinetuneOptions().recipe(FPSConfig())["adam_beta2"]}
    config = DEFAULT.build(tiny_vit(), 0.1, 0)
    assert config.budget == pytest.approx(0.1, rel=1e-3)
    assert replace(config, budget=None) == replace(FPSConfig(), budget=None, task_type=config.task_type)


def test_weights_of_norms_get_the_gradient_that_they_have_in_the_base_model():
    base, (model, found) = tiny_vit(), trained(TRAINING_CANDIDATES["try-norm-weights-biases"][1])
    for each in (base, model):
        each(pixel_values=images(4), labels=LABELS).loss.backward()
    weights = {name: p for name, p in found.items() if name.endswith("base_layer.weight")}
    for name, parameter in weights.items():
        path = name.removeprefix("base_model.model.").replace(".base_layer", "")
        torch.testing.assert_close(parameter.grad, base.get_parameter(path).grad)


@pytest.mark.parametrize(("build", "x"), [(tiny_vit, images(2)), (tiny_conv, images(2))])
@pytest.mark.parametrize("bias", ["all", "none"])
def test_a_scaled_neuron_is_one_with_a_scaled_weight(build, x, bias):
    model = adapted(build(), bias=bias)
    plain = dense_reference(build(), model, ["default"])
    for seed, (path, layer) in enumerate(weighted_of(model).items()):
        add_scale(layer)
        module, scale = plain.get_submodule(path), normal(layer.neurons, seed=seed)
        with torch.no_grad():
            layer.output_scale.copy_(scale)
            module.weight.mul_(1 + scale.view(-1, *(1,) * (module.weight.dim() - 1)))
        module.scale = scale
    found, expected = model(x), plain(x)
    found, expected = (getattr(output, "logits", output) for output in (found, expected))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    found.square().sum().backward()
    expected.square().sum().backward()
    for path, layer in weighted_of(model).items():
        module = plain.get_submodule(path)
        start = module.weight.detach().flatten(1) / (1 + module.scale)[:, None]
        reference = (module.weight.grad.flatten(1) * start).sum(1)
        torch.testing.assert_close(layer.output_scale.grad, reference, rtol=1e-3, atol=1e-3 * reference.abs().max())


def test_rates_and_decay_are_those_of_the_kinds(tmp_path):
    model, found = trained(TrainingCandidate(bias="with_norms", bias_rate=3.0, weight_decay=0.1))
    arguments = TrainingArguments(str(tmp_path), learning_rate=1e-2, use_cpu=True, report_to=[])
    optimizer, _ = TrainingCandidate(bias_rate=3.0, head_rate=0.1, weight_decay=0.1).optimizers(model, arguments)
    names = {id(parameter): name for name, parameter in found.items()}
    settings = {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert settings == {
        name: (1e-3, 0.0) if "classifier" in name else (3e-2 if "fps_bias" in name else 1e-2, 0.1) for name in found
    }
    assert isinstance(optimizer, torch.optim.AdamW)
    assert TrainingCandidate().optimizers(model, arguments) == (None, None)


@pytest.mark.parametrize("name", ["try-clip", "try-drop-path", "try-bias-rate-third"])
def test_a_cell_is_trained_as_its_candidate_says(name, setting, monkeypatch):
    seen = {}

    def train(model, arguments, images, collator, **options):
        seen.update(model=model, arguments=arguments, **options)
        return 0.0

    monkeypatch.setattr(cell_run, "train", train)
    cell_run.run_cell(Cell("bright", name, 0.2, 0, 1e-2), replace(setting, epochs=1))
    assert seen["arguments"].max_grad_norm == (1.0 if name == "try-clip" else 0.0)
    assert drop_path_rates(seen["model"]) == (pytest.approx([0.0, 0.1]) if name == "try-drop-path" else [])
    assert (seen["optimizers"][0] is not None) == (name == "try-bias-rate-third")
