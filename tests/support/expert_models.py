"""Tiny language models whose experts lie in one tensor, in either storage order, and what their experts compute."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from peft_fps.layers.packed_layer import PackedLayer
from tests.support.helpers import layers_of, selected_columns


EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
QWEN = {"moe_intermediate_size": 12, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
OSS = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "layer_types": ["full_attention"]}
LLAMA4 = {"intermediate_size_mlp": 12, "num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 8}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
DEEPSEEK = {"moe_intermediate_size": 12, "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 0}

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "Mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4)),
    "Qwen3-MoE": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **QWEN)),
    "gpt-oss": lambda: GptOssForCausalLM(GptOssConfig(**SIZES, **OSS)),
    "Llama 4": lambda: Llama4ForCausalLM(Llama4TextConfig(**SIZES, **LLAMA4, interleave_moe_layer_step=1)),
    "DeepSeek-V3": lambda: DeepseekV3ForCausalLM(
        DeepseekV3Config(**SIZES, **LATENT, **DEEPSEEK, n_group=1, topk_group=1)
    ),
}


def expert_model(name: str, implementation: str | None = None) -> PreTrainedModel:
    """A model in evaluation mode, all of whose weights are random; every call gives an equal one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MODELS[name]()
        for path, parameter in model.named_parameters():
            nn.init.normal_(parameter, std=0.02 if "router" in path and parameter.dim() == 1 else 0.3)
    if implementation is not None:
        model.config._experts_implementation = implementation
    return model.eval()


def stored_change(layer: PackedLayer, adapter_name: str = "default") -> Tensor:
    """ΔW in the stored shape `(experts, ...)`, entry by entry."""
    weight = layer.base_layer.weight
    transposed = layer.base_layer.transposed
    each = weight.shape[2 if transposed else 1]
    delta = torch.zeros(weight.shape)
    values = iter(layer.fps_values[adapter_name].tolist())
    for neuron, columns in enumerate(selected_columns(layer, adapter_name)):
        expert, out = divmod(neuron, each)
        for column in columns:
            delta[(expert, column, out) if transposed else (expert, out, column)] = next(values)
    return delta


def packed_layers(model: nn.Module) -> dict[str, PackedLayer]:
    return {path: layer for path, layer in layers_of(model).items() if isinstance(layer, PackedLayer)}


def write_changes(plain: nn.Module, model: nn.Module, adapter_name: str = "default") -> None:
    """Write the changes of packed weights and their biases into a plain copy of the base model."""
    parameters = dict(plain.named_parameters())
    with torch.no_grad():
        for path, layer in packed_layers(model).items():
            parameters[path] += stored_change(layer, adapter_name)
            if adapter_name in layer.fps_bias:
                bias = parameters[f"{path}_bias"]
                bias += layer.fps_bias[adapter_name].view(bias.shape)
