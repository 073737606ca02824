"""A model that reads weights off its layers computes what one does that calls them."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_fps.layers.tensors_as_read import ChangedTensor, as_read
from tests.support.helpers import adapted, base_bytes, bits, config, dense_reference, fill, layers_of, normal


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
    model = adapted(built(), "a")
    model.add_adapter("b", config(per_neuron=3, importance="random"))
    fill(model, "b", seed=4)
    return model.eval()


def test_it_computes_with_the_active_adapters_merged_or_not():
    model, x = two_adapters(), normal(2, 4, 6)
    before = base_bytes(model)
    for names in (["a"], ["b"], ["a", "b"]):
        model.base_model.set_adapter(names)
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
    for path, layer in layers_of(model).items():
        module: Any = plain.get_submodule(path)
        places = layer.structure("default").positions.long()
        torch.testing.assert_close(layer.fps_values["default"].grad, module.weight.grad.reshape(-1)[places])
        torch.testing.assert_close(layer.fps_bias["default"].grad, module.bias.grad)
        assert layer.base_layer.weight.grad is None


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
    seen: Any = as_read(frozen, lambda: asked.append(None) or frozen + 1)  # type: ignore[func-returns-value]
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
    nn.init.zeros_(layer.weight)
    layer.bias.data.fill_(2.0)
    assert not layer.base_layer.weight.any()
    assert layer.base_layer.bias.tolist() == [2.0] * 3
    copied = copy.deepcopy(model)
    assert bits(layers_of(copied)["step"].base_layer.weight) == bits(layer.base_layer.weight)
