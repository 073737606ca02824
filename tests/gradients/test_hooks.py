"""Gradients handed over one by one, and checkpointing in evaluation mode; nothing is left behind."""

import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MambaConfig, MambaForCausalLM
from transformers.cache_utils import Cache

from peft_fps.gradients.hooks import checkpointed, gradients_handed_over
from tests.gradients.naive_sums import ENABLING, with_dropout
from tests.support.helpers import images, tiny_gpt2, tiny_llama, tiny_mlp, tiny_vit, tokens


class Shared(nn.Module):
    """One weight that is used twice, and one that is not used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.used, self.idle = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(self.used(x).tanh())


def weights_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: module.weight for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def state(model: nn.Module) -> list[Any]:
    """What of a model's parameters a backward pass could change."""
    return [
        (name, p.requires_grad, None if p.grad is None else p.grad.clone(), p._post_accumulate_grad_hooks)
        for name, p in model.named_parameters()
    ]


def assert_same_state(model: nn.Module, before: list[Any]) -> None:
    for (name, required, gradient, hooks), then in zip(state(model), before, strict=True):
        assert (name, required) == then[:2]
        assert (gradient is None) == (then[2] is None)
        assert gradient is None or torch.equal(gradient, then[2])
        assert not hooks or hooks == then[3]


def prepared(model: nn.Module) -> nn.Module:
    """Some parameters require grad and have one; some do not."""
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 3 == 0)
        if i % 2 == 0:
            parameter.grad = torch.full_like(parameter, i + 1.0)
    return model


def test_gradients_are_those_of_autograd():
    model, x = tiny_vit(), images()
    expected = tiny_vit()
    expected(x).logits.square().sum().backward()
    found: dict[str, Tensor] = {}
    with gradients_handed_over(
        model, weights_of(model), lambda name, gradient: found.update({name: gradient.clone()})
    ):
        model(x).logits.square().sum().backward()
    assert set(found) == set(weights_of(model))
    for name, weight in weights_of(expected).items():
        assert torch.equal(found[name], weight.grad), name


def test_a_weight_that_is_used_twice_is_handed_over_once_and_whole():
    model, expected, x = Shared(), Shared(), torch.randn(3, 5)
    expected(x).sum().backward()
    found: list[tuple[str, Tensor]] = []
    with gradients_handed_over(model, weights_of(model), lambda *pair: found.append(pair)):
        model(x).sum().backward()
    assert [name for name, _ in found] == ["used"]
    torch.testing.assert_close(found[0][1], expected.used.weight.grad)


def test_every_backward_pass_is_handed_over_by_itself():
    model, calls = tiny_mlp(), Counter()
    with gradients_handed_over(model, weights_of(model), lambda name, _: calls.update([name])):
        for _ in range(3):
            model(torch.ones(2, 10)).sum().backward()
    assert calls == {"first": 3, "last": 3}


def test_one_gradient_lives_at_a_time_and_no_other_parameter_has_one():
    model = prepared(tiny_vit())
    earlier: list[weakref.ref[Tensor]] = []
    required: set[str] = set()

    def receive(name: str, gradient: Tensor) -> None:
        assert [ref for ref in earlier if ref() is not None] == []
        assert all(parameter.grad is None for parameter in model.parameters())
        assert not torch.is_grad_enabled()
        assert not gradient.requires_grad
        required.update(name for name, parameter in model.named_parameters() if parameter.requires_grad)
        earlier.append(weakref.ref(gradient))

    with gradients_handed_over(model, weights_of(model), receive):
        model(images()).logits.sum().backward()
    assert len(earlier) == len(weights_of(model))
    assert required == {f"{name}.weight" for name in weights_of(model)}


@pytest.mark.parametrize("fails", ["", "in the block", "in receive"])
def test_everything_is_put_back(fails: str):
    model = prepared(tiny_vit())
    before = state(model)

    def receive(name: str, gradient: Tensor) -> None:
        if fails == "in receive":
            raise KeyboardInterrupt

    try:
        with gradients_handed_over(model, weights_of(model), receive):
            model(images()).logits.sum().backward()
            if fails == "in the block":
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert_same_state(model, before)
    expected = prepared(tiny_vit())
    for one in (model, expected):  # no hook takes gradients away afterwards
        one(images()).logits.sum().backward()
    assert_same_state(model, state(expected))


# --- checkpointing ---------------------------------------------------------------------------------------------------


def tiny_mamba() -> MambaForCausalLM:
    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=8, num_hidden_layers=2, state_size=4))


def llama_loss(model: nn.Module) -> Tensor:
    return model(input_ids=tokens(), labels=tokens(), use_cache=True).loss


CHECKPOINTED = {
    "llama": (tiny_llama, llama_loss, "model.layers.1.mlp.up_proj"),
    "gpt2": (tiny_gpt2, llama_loss, "transformer.h.1.mlp.c_fc"),  # whose blocks get their cache by position
    "mamba": (tiny_mamba, llama_loss, "backbone.layers.1.mixer.out_proj"),  # which calls its cache by another name
    "vit": (tiny_vit, lambda model: model(images()).logits.square().sum(), "vit.layers.0.mlp.fc1"),
}


@ENABLING
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("kind", CHECKPOINTED)
def test_layers_are_recomputed_and_gradients_stay_the_same(kind: str, training: bool):
    build, loss, inner = CHECKPOINTED[kind]
    found = []
    for enabled in (False, True):
        model = with_dropout(build(), 0.2).train(training)
        if enabled:
            model.gradient_checkpointing_enable({"use_reentrant": True})
        calls: list[bool] = []
        model.get_submodule(inner).register_forward_pre_hook(lambda *_, calls=calls: calls.append(True))
        torch.manual_seed(0)
        with checkpointed(model):
            loss(model).backward()
        assert len(calls) == (2 if enabled else 1)
        found.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        if one is not None:  # without a cache, attention may add up in another order
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-8)


@ENABLING
@pytest.mark.parametrize("fails", [False, True], ids=["", "error"])
def test_flags_and_forwards_are_put_back(fails: bool):
    model = tiny_llama()
    model.gradient_checkpointing_enable()
    model.model.layers[0].gradient_checkpointing = False  # every other layer only
    hooked = model.model.layers[1]

    def before() -> list[tuple[str, Any, bool]]:
        return [
            (n, getattr(m, "gradient_checkpointing", None), "forward" in vars(m)) for n, m in model.named_modules()
        ]

    expected = before()
    try:
        with checkpointed(model):
            assert "forward" in vars(hooked)
            assert "forward" not in vars(model.model.layers[0])
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert before() == expected


def test_a_model_without_checkpointing_is_left_alone():
    for model in (tiny_mlp(), tiny_vit()):
        with checkpointed(model):
            assert not any("forward" in vars(module) for module in model.modules())


@ENABLING
def test_a_forward_that_was_put_over_a_layers_own_stays():
    model = tiny_vit()
    model.gradient_checkpointing_enable()
    layer = model.vit.layers[0]
    own = layer.forward = lambda *args, **kwargs: type(layer).forward(layer, *args, **kwargs)  # as accelerate does
    with checkpointed(model):
        assert layer.forward is own
        model(images()).logits.sum().backward()
    assert layer.forward is own
    assert layer.gradient_checkpointing


@ENABLING
def test_a_cache_is_kept_where_a_layer_only_reads_it():
    model, seen = tiny_llama(), []
    model.gradient_checkpointing_enable()
    layer = model.model.layers[1]
    own = type(layer).forward

    class Reader(type(layer)):
        _can_checkpoint_with_cache = True

        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            caches = [name for name, value in kwargs.items() if isinstance(value, Cache)]
            seen.append(len(caches))
            return own(self, *args, **{name: value for name, value in kwargs.items() if name not in caches})

    layer.__class__ = Reader
    with checkpointed(model):
        llama_loss(model).backward()
    assert seen == [1, 1]
