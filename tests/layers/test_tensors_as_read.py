"""A model that reads weights off its layers computes what one does that calls them."""

import copy
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import RwkvConfig, RwkvForCausalLM

from peft_fps.layers.tensors_as_read import ChangedTensor, as_read
from tests.layers.comparisons import activate, assert_adapter_gradients, several_adapters
from tests.support.helpers import adapted, base_bytes, bits, dense_reference, layers_of, normal, tokens


class Reads(nn.Module):
    """As state space models do: a short convolution and a projection whose tensors are handed to functions."""

    def __init__(self) -> None:
        super().__init__()
        self.short = nn.Conv1d(4, 4, 3, groups=4)
        self.step = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.short.weight.dtype)
        taps = self.short.weight.squeeze(1)
        rows = [torch.stack([x[..., i], x[..., i + 1], x[..., i + 2]], -1) for i in range(x.shape[-1] - 2)]
        y = torch.stack([torch.sum(row * taps, dim=-1) + self.short.bias for row in rows], -1)
        return self.step.weight @ y + self.step.bias[:, None]


def built() -> Reads:
    torch.manual_seed(0)
    return Reads().eval()


def two_adapters() -> Any:
    return several_adapters(built(), {"a": {}, "b": {"per_neuron": 3, "importance": "random"}})


def test_it_computes_with_the_active_adapters_merged_or_not():
    model, x = two_adapters(), normal(2, 4, 6)
    before = base_bytes(model)
    for names in (["a"], ["b"], ["a", "b"]):
        activate(model, *names)
        expected = dense_reference(built(), model, names)(x)
        torch.testing.assert_close(model(x), expected)
        model.merge_adapter()
        torch.testing.assert_close(model(x), expected)
        with model.disable_adapter():
            assert torch.equal(model(x), built()(x))
        model.unmerge_adapter()
        with model.disable_adapter():
            assert torch.equal(model(x), built()(x))
    assert base_bytes(model) == before


def test_changes_get_gradients_and_the_base_gets_none():
    model, x = adapted(built()), normal(2, 4, 6)
    plain = dense_reference(built(), model, ["default"]).requires_grad_(True)
    plain(x).square().sum().backward()
    model(x).square().sum().backward()
    assert_adapter_gradients(model, plain)
    assert all(layer.base_layer.weight.grad is None for layer in layers_of(model).values())


def test_samples_of_several_adapters_are_refused_and_those_of_one_are_not():
    model, x = two_adapters(), normal(2, 4, 6)
    expected = dense_reference(built(), model, ["b"])(x)
    torch.testing.assert_close(model(x, adapter_names=["b", "b"]), expected)
    assert torch.equal(model(x, adapter_names=["__base__", "__base__"]), built()(x))
    with pytest.raises(
        ValueError, match=r"short: the model computes with the weight that it reads.*batch of their own"
    ):
        model(x, adapter_names=["a", "b"])


def test_it_compiles_and_derives():
    model, x = adapted(built()), normal(2, 4, 6)
    expected = model(x)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), expected)
    found = torch.func.grad(lambda x: model(x).square().sum())(x)
    x.requires_grad_()
    model(x).square().sum().backward()
    torch.testing.assert_close(found, x.grad)


def test_to_describe_a_tensor_forms_no_sum():
    asked: list[None] = []
    frozen = nn.Parameter(normal(3, 4).bfloat16(), requires_grad=False)
    seen: Any = as_read(
        frozen,
        lambda: asked.append(None) or frozen + 1,  # type: ignore[func-returns-value]
        lambda: pytest.fail("nothing writes"),
        "layer.weight",
    )
    assert isinstance(seen, Tensor)
    assert (seen.dtype, seen.device, seen.shape, seen.ndim) == (torch.bfloat16, frozen.device, (3, 4), 2)
    assert (seen.numel(), seen.size(0), len(seen), seen.is_floating_point()) == (12, 3, 3, True)
    assert seen.data_ptr() == frozen.data_ptr()
    assert not seen.requires_grad
    assert not asked
    for computed in (
        seen.T.T,
        seen[:],
        seen.float().bfloat16(),
        torch.cat([seen]),
        F.linear(torch.eye(4).bfloat16(), seen).T,
    ):
        assert not isinstance(computed, ChangedTensor)
        assert torch.equal(computed, frozen + 1)
    assert len(asked) == 5


def test_what_writes_in_place_writes_to_the_frozen_tensor():
    model = adapted(built())
    layer = layers_of(model)["step"]
    with pytest.warns(UserWarning, match="written to in place"):
        nn.init.zeros_(layer.weight)
    layer.bias.data.fill_(2.0)
    assert not layer.base_layer.weight.any()
    assert layer.base_layer.bias.tolist() == [2.0] * 3
    copied = copy.deepcopy(model)
    assert bits(layers_of(copied)["step"].base_layer.weight) == bits(layer.base_layer.weight)


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "mul_": lambda weight: weight.mul_(2),
    "div_": lambda weight: weight.div_(2),
    "copy_": lambda weight: weight.copy_(torch.ones(3, 4)),
    "nn.init by name": lambda weight: nn.init.constant_(tensor=weight, val=2.0),
    "out": lambda weight: torch.ones(3, 4, out=weight),
    "foreach": lambda weight: torch._foreach_mul_([weight], 2.0),
    "+=": lambda weight: operator.iadd(weight, 1),
    "item": lambda weight: operator.setitem(weight, 1, 3.0),
    "data": lambda weight: setattr(weight, "data", torch.ones(3, 4)),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_write_is_warned_of_once_and_reaches_the_base_weight(write: str) -> None:
    """The changes of an adapter do not follow, where RWKV for example rescales its weights."""
    model, x = adapted(built()), normal(2, 4, 6)
    expected = built().step.weight.detach().clone()
    WRITES[write](expected)
    layer = layers_of(model)["step"]
    named = r"^step: the weight of this layer.*'default'.*do not follow.*merge_and_unload.*rescale_every = 0"
    with torch.no_grad():
        with pytest.warns(UserWarning, match=named):
            WRITES[write](layer.weight)
        layers_of(model)["short"].bias.mul_(2)  # no second warning
    assert bits(layer.base_layer.weight) == bits(expected)
    model(x).sum().backward()


def test_no_warning_where_no_number_of_a_changed_tensor_is_written() -> None:
    model = adapted(built())
    layer = layers_of(model)["step"]
    before = bits(layer.base_layer.weight)
    with torch.no_grad():
        layer.weight.mul_(1)
        layer.weight.div_(1)
    layer.weight.requires_grad_(False)
    layer.weight.requires_grad = False
    layer.weight.grad = None
    assert bits(layer.base_layer.weight) == before
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)
    model.double().float()
    model.merge_adapter()
    layer.weight.data.mul_(1)
    model.unmerge_adapter()
    copy.deepcopy(model).merge_and_unload()


def test_what_it_writes_to_another_tensor_is_the_changed_weight() -> None:
    layer = layers_of(adapted(built()))["step"]
    expected = layer.base_layer.weight.detach() + layer.get_delta_weight("default").detach()
    with torch.no_grad():
        for written in (
            torch.zeros(3, 4).copy_(layer.weight),
            torch.zeros(3, 4).add_(layer.weight),
            torch.add(torch.zeros(3, 4), layer.weight, out=torch.empty(3, 4)),
        ):
            torch.testing.assert_close(written, expected)
        with pytest.warns(UserWarning, match="written to in place"):
            doubled = layer.weight.mul_(2)
        # the weight doubles, the change does not
        torch.testing.assert_close(doubled + 0, 2 * built().step.weight + layer.get_delta_weight("default"))


def test_rwkv_that_rescales_its_weights_is_warned_of_and_the_advice_helps() -> None:
    def tiny(**options: Any) -> Any:
        torch.manual_seed(0)
        sizes = {"vocab_size": 19, "hidden_size": 8, "num_hidden_layers": 4, "attention_hidden_size": 8}
        return RwkvForCausalLM(RwkvConfig(**sizes, **options))

    def outputs(model: Any, training: bool) -> Tensor:
        return model.train(training)(input_ids=tokens(2, 5, vocabulary=19), use_cache=False).logits

    rescaled = adapted(tiny(rescale_every=2), exclude_modules=["head"])
    named = r"^rwkv\.blocks\.2\.attention\.output: the weight of this layer"  # the first two blocks are divided by 1
    with torch.no_grad():
        with pytest.warns(UserWarning, match=named) as caught:
            outputs(rescaled, False)
        outputs(rescaled, True)
    assert [Path(warning.filename).name for warning in caught] == ["modeling_rwkv.py"]
    plain = adapted(tiny(rescale_every=2), exclude_modules=["head"])
    plain.config.rescale_every = 0
    with torch.no_grad():
        torch.testing.assert_close(outputs(plain, True), outputs(plain, False))


# --- assigned to modules --------------------------------------------------------------------------------------------


def test_it_passes_for_the_parameter_that_it_stands_for() -> None:
    model = adapted(built())
    layer = layers_of(model)["step"]
    assert isinstance(layer.weight, nn.Parameter)
    assert model.get_base_model().get_parameter("step.weight").shape == (3, 4)
    layer.weight = layer.weight
    layer.bias = layer.base_layer.bias
    assert "weight" not in layer._parameters
    before = layer.base_layer.weight
    for parameter in (nn.Parameter(torch.ones(3, 4)), None):
        with pytest.raises(ValueError, match=r"^step: its weight is to be replaced while it has an adapter.*Nothing"):
            layer.register_parameter("weight", parameter)
    assert layer.base_layer.weight is before


def test_a_module_that_did_not_share_it_is_refused() -> None:
    layer, other = layers_of(adapted(built()))["step"], nn.Linear(4, 3)
    before = other.weight
    with pytest.raises(ValueError, match=r"^step\.weight has an adapter, and is assigned to a Linear.*before"):
        other.weight = layer.weight
    assert other.weight is before
