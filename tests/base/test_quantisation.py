"""What a quantised weight is, and how it is read and written back, with the libraries' own layers."""

import copy
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_fps import FPSConfig
from peft_fps.base.quantisation import (
    base_weight,
    check_quantised,
    dense_weight,
    held_by,
    put,
    quantisation,
    quantised_elements,
    requantised,
    stored_weight,
)
from tests.support.helpers import normal
from tests.support.quantised_bases import KINDS, dense, library, plain_layer, quantised_layer, stored_bytes, tolerance


ERROR = {"8bit": 0.02, "4bit": 0.2, "nested 4bit": 0.2, "torchao": 0.02, "hqq": 0.2}
"""Bounds on the quantisation error, relative to the weight's norm."""


def backend(kind: str, layer: Any) -> Any:
    """PEFT's, as the tuner layer has it; torchao's is told how the weight was quantised."""
    known = quantisation(layer)
    assert known is not None
    made: Any = known.make_backend()
    if kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        made.get_apply_tensor_subclass = Int8WeightOnlyConfig
    return made


# --- packed for inference -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("evaluated", ["before", "after", "never"])
def test_gradients_pass_a_layer_that_has_been_evaluated(evaluated: str, bias: bool) -> None:
    """On CPUs with bfloat16 instructions bitsandbytes packs the weight then; on others nothing happens."""
    x, gradients = normal(4, 64), []
    for when in (evaluated, "never"):
        torch.manual_seed(0)
        first = nn.Linear(64, 64)
        layer = quantised_layer("4bit", nn.Linear(64, 64, bias=bias))
        layer.support_avx512bf16_for_cpu = library("4bit").functional.has_avx512bf16()  # as outside of these tests
        model: Any = nn.Sequential(first, layer)
        if when == "before":
            with torch.no_grad():
                model.eval()(x)
        adapter = get_peft_model(model, FPSConfig(per_neuron=1, importance="magnitude", target_modules=["1"]))
        if when == "after":
            with torch.no_grad():
                adapter.eval()(x)
        first.weight.requires_grad_(True)
        adapter.train()(x).square().sum().backward()
        gradients.append(first.weight.grad)
    assert gradients[0] is not None
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0.05, atol=0.5)


# --- what it is -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [nn.Linear(4, 3), nn.Conv2d(3, 2, 1), Conv1D(3, 4), nn.Embedding(4, 3), nn.GELU()])
def test_what_is_not_quantised(module: nn.Module) -> None:
    assert quantisation(module) is None


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_quantised(kind: str) -> None:
    layer = quantised_layer(kind, plain_layer())
    known = quantisation(layer)
    assert known is not None
    names = {"8bit": "bnb 8bit", "4bit": "bnb 4bit", "nested 4bit": "bnb 4bit"}
    assert known.make_backend().backend_name == names.get(kind, kind)
    assert stored_weight(layer) is (layer.W_q if kind == "hqq" else layer.weight)


def test_subclasses_are_quantised_alike() -> None:
    lib = library("4bit")
    assert quantisation(lib.nn.LinearNF4(64, 32)) == quantisation(lib.nn.Linear4bit(64, 32))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_weight_counts_as_many_as_it_stands_for(kind: str, bias: bool) -> None:
    """With HQQ's bias, which is no parameter."""
    layer = quantised_layer(kind, plain_layer(bias=bias))
    others = sum(p.numel() for p in layer.parameters() if p is not stored_weight(layer))
    assert quantised_elements(layer) + others == 64 * 32 + 32 * bias


def test_weights_that_are_not_quantised_yet_are_refused() -> None:
    lib = library("8bit")
    for layer in (lib.nn.Linear8bitLt(64, 32, has_fp16_weights=False), lib.nn.Linear4bit(64, 32)):
        with pytest.raises(ValueError, match=r"a\.b \(Linear\w+\) has its weight still in .*float32.*\.to\(device\)"):
            check_quantised("a.b", layer)
        check_quantised("a.b", layer.to("cpu"))


def test_8bit_layers_that_train_their_weight_are_refused() -> None:
    layer = library("8bit").nn.Linear8bitLt(64, 32, has_fp16_weights=True)
    with pytest.raises(ValueError, match="a.b is a Linear8bitLt with has_fp16_weights=True, expected int8"):
        check_quantised("a.b", layer)


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_weights_on_the_meta_device_may_be_quantised_later(kind: str) -> None:
    lib = library(kind)
    with torch.device("meta"):
        layer = lib.nn.Linear8bitLt(64, 32, has_fp16_weights=False) if kind == "8bit" else lib.nn.Linear4bit(64, 32)
    check_quantised("a.b", layer)


# --- reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
def test_the_dense_weight_is_what_the_layer_computes_with(kind: str, used: bool) -> None:
    """8-bit layers move their scales from the weight to the layer when they are first called."""
    plain = plain_layer()
    layer, twin = quantised_layer(kind, plain), quantised_layer(kind, plain)
    if used:
        layer(normal(3, 64))
    found = dense_weight(layer)
    assert found.shape == (32, 64)
    torch.testing.assert_close(found.float(), dense(twin), rtol=0, atol=tolerance(kind))
    assert (found.float() - plain.weight).norm() < ERROR[kind] * plain.weight.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_reading_changes_nothing(kind: str) -> None:
    layer, x = quantised_layer(kind, plain_layer()), normal(3, 64)
    before, output = stored_bytes(layer), layer(x)
    dense_weight(layer).zero_()
    assert stored_bytes(layer).items() >= before.items()
    torch.testing.assert_close(layer(x), output, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["4bit", "nested 4bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_4bit_weights_that_were_packed_anew_for_the_processor(kind: str, dtype: torch.dtype) -> None:
    """bitsandbytes does so at the first inference where there are bfloat16 instructions; scales become bfloat16."""
    library(kind)
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    theirs = plain_layer(inputs=128, seed=5).to(dtype)
    layer = quantised_layer(kind, plain_layer(inputs=128).to(dtype))
    expected = dense_weight(layer)
    weight = layer.weight
    weight.data, weight.quant_state = _convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    packed = stored_bytes(layer)
    found = dense_weight(layer)
    assert found.dtype == expected.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0)
    held = requantised(layer, theirs.weight.clone(), backend(kind, layer))
    assert stored_bytes(layer) == packed
    assert weight.quant_state.packing_format_for_cpu
    put(layer, held)
    assert torch.equal(dense_weight(layer), dense_weight(quantised_layer(kind, theirs)))


@pytest.mark.parametrize("kind", KINDS)
def test_base_weights_are_read_when_they_are_needed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = quantised_layer(kind, plain_layer())
    found = base_weight(layer)
    with torch.no_grad():
        torch.testing.assert_close(found.read().float(), dense(layer), rtol=0, atol=tolerance(kind))
    assert found.stored_as in ("bnb 8bit", "bnb 4bit", "torchao", "hqq")
    assert (found.transposed, found.device) == (False, torch.device("cpu"))


def test_base_weights_of_other_layers() -> None:
    for layer, transposed in ((nn.Linear(4, 3).bfloat16(), False), (Conv1D(3, 4).bfloat16(), True)):
        found = base_weight(layer)
        assert found.read() is layer.weight
        assert (found.stored_as, found.transposed) == ("bfloat16", transposed)


# --- writing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_another_weight_is_quantised_as_the_library_does_it(kind: str) -> None:
    ours, theirs = plain_layer(), plain_layer(seed=5)
    layer = quantised_layer(kind, ours)
    before = stored_bytes(layer)
    held = requantised(layer, theirs.weight.clone(), backend(kind, layer))
    assert stored_bytes(layer).items() >= before.items()
    put(layer, held)
    theirs.bias.copy_(ours.bias)
    expected = quantised_layer(kind, theirs)
    torch.testing.assert_close(dense_weight(layer), dense_weight(expected), rtol=0, atol=0)
    x = normal(3, 64)
    torch.testing.assert_close(layer(x), expected(x), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
def test_what_held_the_weight_is_put_back_bit_for_bit(kind: str, used: bool) -> None:
    layer, x = quantised_layer(kind, plain_layer()), normal(3, 64)
    if used:
        layer(x)
    dense_weight(layer)  # an 8-bit layer notes its scales
    before, held = stored_bytes(layer), held_by(layer)
    put(layer, requantised(layer, normal(32, 64, seed=9), backend(kind, layer)))
    layer(x)
    assert stored_bytes(layer) != before
    put(layer, held)
    assert stored_bytes(layer) == before
    assert stored_bytes(copy.copy(layer).to("cpu")) == before  # not quantised a second time
    torch.testing.assert_close(layer(x), quantised_layer(kind, plain_layer())(x), rtol=0, atol=0)


def test_4bit_weights_know_their_layer() -> None:
    layer = quantised_layer("4bit", plain_layer())
    put(layer, requantised(layer, normal(32, 64), backend("4bit", layer)))
    assert layer.weight.module is layer
    assert layer.quant_state is layer.weight.quant_state


def test_a_weight_that_would_be_quantised_otherwise_is_refused() -> None:
    layer = quantised_layer("torchao", plain_layer())
    made = backend("torchao", layer)
    from torchao.quantization import Float8WeightOnlyConfig

    made.get_apply_tensor_subclass = Float8WeightOnlyConfig
    before = stored_bytes(layer)
    with pytest.raises(ValueError, match="gave a Float8Tensor, expected a Int8Tensor as before"):
        requantised(layer, normal(32, 64), made)
    assert stored_bytes(layer) == before
