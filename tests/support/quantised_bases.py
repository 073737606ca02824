"""Quantised layers and models, each made by its library; a test is skipped where the library is missing."""

import copy
import warnings
from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, BitsAndBytesConfig, TorchAoConfig

from peft_fps.base.quantisation import stored_weight
from tests.support.helpers import normal


LIBRARIES = {
    "8bit": "bitsandbytes",
    "4bit": "bitsandbytes",
    "nested 4bit": "bitsandbytes",
    "torchao": "torchao",
    "hqq": "hqq.core.quantize",
}
KINDS = list(LIBRARIES)
LOADED = ["8bit", "4bit", "nested 4bit", "torchao"]
"""Kinds that transformers quantises itself as it loads a model."""


def library(kind: str) -> Any:
    """The library that quantises so; skips the test without it."""
    name = LIBRARIES[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of their own imports
        return pytest.importorskip(name, reason=f"{name} is not installed, which quantises {kind} bases")


# --- layers ---------------------------------------------------------------------------------------------------------


def plain_layer(inputs: int = 64, outputs: int = 32, bias: bool = True, seed: int = 0) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)
    for number, parameter in enumerate(layer.parameters()):
        parameter.copy_(normal(*parameter.shape, seed=seed + number))
    return layer


def quantised_layer(kind: str, layer: nn.Linear) -> Any:
    """A quantised layer in the place of a plain one, which stays as it is."""
    lib, size, bias = library(kind), (layer.in_features, layer.out_features), layer.bias is not None
    if kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        result: Any = copy.deepcopy(layer)
        quantize_(result, Int8WeightOnlyConfig())
        return result
    if kind == "hqq":
        settings = lib.BaseQuantizeConfig(nbits=4, group_size=16)
        with torch.no_grad():
            return lib.HQQLinear(
                copy.deepcopy(layer), settings, compute_dtype=torch.float32, device=str(layer.weight.device)
            )
    if kind == "8bit":
        result = lib.nn.Linear8bitLt(*size, bias=bias, has_fp16_weights=False)
    else:
        nested = kind == "nested 4bit"
        options = {"quant_type": "nf4", "compute_dtype": torch.float32, "compress_statistics": nested}
        result = lib.nn.Linear4bit(*size, bias=bias, **options)
        result.support_avx512bf16_for_cpu = False
        result.to(layer.weight.dtype)
    result.load_state_dict(layer.state_dict())
    return result.to(torch.get_default_device()).requires_grad_(False)


def dense(layer: Any) -> Tensor:
    """The weight that a quantised layer computes with: what it makes of the unit vectors, without its bias."""
    layer = copy.copy(layer).eval()
    with torch.no_grad():
        result = layer(torch.eye(layer.in_features))
        return (result if layer.bias is None else result - layer.bias).t().float()


def tolerance(kind: str) -> float:
    """How far `dense` may be off for weights of a common size; the 8-bit layer computes in float16."""
    return 5e-3 if kind == "8bit" else 1e-5


# --- models ---------------------------------------------------------------------------------------------------------


def plain_bert(seed: int = 0, build: Callable[..., nn.Module] = BertForSequenceClassification) -> Any:
    config = BertConfig(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def quantised(kind: str, model: nn.Module, skip: tuple[str, ...] = ("classifier",), **options: Any) -> Any:
    """A quantised copy of a transformers model, frozen; `skip` names modules that stay as they are."""
    library(kind)
    if kind == "hqq":
        result = copy.deepcopy(model)
        for name, module in list(result.named_modules()):
            if type(module) is nn.Linear and not name.startswith(skip):
                parent, _, own = name.rpartition(".")
                setattr(result.get_submodule(parent), own, quantised_layer(kind, module))
        return result.requires_grad_(False)
    if kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        settings: Any = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=list(skip))
    elif kind == "8bit":
        settings = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(skip))
    else:
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=kind == "nested 4bit",
            llm_int8_skip_modules=list(skip),
        )
    options.setdefault("dtype", torch.float32)
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        result = type(model).from_pretrained(
            folder, quantization_config=settings, device_map=torch.get_default_device(), **options
        )
    result.name_or_path = result.config._name_or_path = ""  # gone
    for module in result.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # packs weights anew where the processor has bfloat16
            module.support_avx512bf16_for_cpu = False
    return result.eval().requires_grad_(False)


def stored_bytes(layer: Any) -> dict[str, bytes]:
    """Every tensor that a quantised base layer computes with, its bias included."""
    found = {}
    weight: Any = stored_weight(layer)
    parts = {"weight": weight}
    if hasattr(weight, "tensor_data_names"):  # torchao
        parts = {name: getattr(weight, name) for name in weight.tensor_data_names}
    if getattr(weight, "quant_state", None) is not None:  # bitsandbytes, 4 bits
        parts |= vars(weight.quant_state)
    parts |= {"SCB": getattr(getattr(layer, "state", None), "SCB", None)}
    parts |= dict(getattr(layer, "meta", None) or {})
    for name, part in {**parts, "bias": layer.bias}.items():
        if isinstance(part, Tensor):
            found[name] = part.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().tobytes()
    return found
