"""Running statistics and other buffers: what a reloaded model computes is what the trained one computed."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn

from tests.support.helpers import bits, config, normal


class WithStatistics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.instance = nn.InstanceNorm2d(4, track_running_stats=True)
        self.without = nn.BatchNorm2d(4, track_running_stats=False)
        self.linear = nn.Linear(4, 5)
        self.head = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.without(self.instance(self.norm(self.convolution(x)))).relu().mean((2, 3))
        return self.head(self.linear(x))


def built(**options: Any) -> tuple[nn.Module, PeftModel]:
    torch.manual_seed(0)
    base = WithStatistics()
    base(normal(4, 3, 6, 6, seed=5))  # statistics that are not those of the start
    targets = {"target_modules": ["convolution", "linear"], "modules_to_save": ["head"]} | options
    return copy.deepcopy(base), get_peft_model(base, config(**targets))


def trained(model: nn.Module, steps: int = 3) -> nn.Module:
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        model(3 + normal(4, 3, 6, 6, seed=step)).square().sum().backward()
        optimizer.step()
    return model.eval()


def test_statistics_stay_and_a_reloaded_model_computes_the_same(tmp_path: Path):
    plain, model = built()
    before = {name: bits(buffer) for name, buffer in plain.named_buffers()}
    trained(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).eval()
    x = normal(2, 3, 6, 6, seed=9)
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)
    merged = model.merge_and_unload()
    assert {n: bits(b) for n, b in merged.named_buffers() if not n.startswith("head")} == {
        name: value for name, value in before.items() if not name.startswith("head")
    }


def test_a_norm_that_is_trained_whole_goes_on_tracking():
    plain, model = built()
    trained(model)
    head = model.base_model.model.head.modules_to_save["default"][0]
    assert not torch.equal(head.running_mean, plain.head[0].running_mean)
    assert int(head.num_batches_tracked) == int(plain.head[0].num_batches_tracked) + 3


def test_a_second_adapter_may_train_a_norm_whole_that_the_first_froze():
    plain, model = built()
    model.add_adapter("second", config(target_modules=["convolution"], modules_to_save=["norm", "head"]))
    model.set_adapter("second")
    trained(model)
    norm = model.base_model.model.norm
    assert not torch.equal(norm.modules_to_save["second"].running_mean, plain.norm.running_mean)
    assert torch.equal(norm.original_module.running_mean, plain.norm.running_mean)


def test_training_mode_is_training_mode_again_after_unloading():
    _, model = built(modules_to_save=[])
    plain = model.train().unload().train()
    assert all(module.training for module in plain.modules())
    before = plain.norm.running_mean.clone()
    plain(3 + normal(4, 3, 6, 6))
    assert not torch.equal(plain.norm.running_mean, before)


def test_modules_say_how_they_compute():
    _, model = built(modules_to_save=[])
    model.train()
    modes = {name: module.training for name, module in model.base_model.model.named_modules()}
    assert not modes["norm"]
    assert not modes["instance"]
    assert modes["without"]
    assert modes["convolution"]


def test_without_a_peft_model_around_it():
    torch.manual_seed(0)
    model = inject_adapter_in_model(config(target_modules=["convolution"]), WithStatistics())
    before = model.norm.running_mean.clone()
    trained(model)
    assert torch.equal(model.norm.running_mean, before)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # from within torch.compile
def test_frozen_statistics_compile():
    _, model = built(modules_to_save=[])
    model.train()
    x = normal(2, 3, 6, 6)
    expected = model(x)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x), expected)
    assert not model.base_model.model.norm.training


class Counts(nn.Module):
    """Keeps what it saw in training, under a buffer that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("last", torch.ones(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.scale.mul_(0.9).add_(0.1 * x.detach().abs().mean())
            self.last.fill_(1)
        return x / self.scale


def test_other_buffers_that_training_changes_are_named_when_the_adapter_is_saved(tmp_path: Path):
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4), Counts()), config(target_modules=["0"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "before")
    model.train()(normal(3, 4)).sum().backward()
    with pytest.warns(UserWarning, match=r"1\.scale: buffers of the base model have changed.*modules_to_save=\['1'\]"):
        model.save_pretrained(tmp_path / "after")


def test_a_module_that_is_trained_whole_keeps_its_buffers(tmp_path: Path):
    base = nn.Sequential(nn.Linear(4, 4), Counts())
    plain = copy.deepcopy(base)
    model = get_peft_model(base, config(target_modules=["0"], modules_to_save=["1"]))
    model.train()(normal(3, 4)).sum().backward()
    model.eval().save_pretrained(tmp_path)
    again, x = PeftModel.from_pretrained(plain, tmp_path).eval(), normal(2, 4, seed=3)
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)
