"""Keys of checkpoints: renamed, without the backbone's name, of joined tensors, or of nothing in the model."""

from typing import Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from peft_fps.base.checkpoint_keys import checkpoint_keys
from tests.support.helpers import tiny_bert, tiny_vit


def test_present_names_are_keys() -> None:
    names = list(tiny_vit().state_dict())
    keys = checkpoint_keys(tiny_vit(), names)
    assert keys.plain == {name: name for name in names}
    assert not keys.converted


def test_former_names_and_names_without_the_backbones() -> None:
    former = "vit.encoder.layer.1.attention.attention.query.weight"
    keys = checkpoint_keys(tiny_vit(), [former, "layers.0.mlp.fc1.bias", "classifier.weight"])
    assert keys.plain == {
        "vit.layers.1.attention.q_proj.weight": former,
        "vit.layers.0.mlp.fc1.bias": "layers.0.mlp.fc1.bias",
        "classifier.weight": "classifier.weight",
    }
    keys = checkpoint_keys(tiny_bert(), ["bert.embeddings.LayerNorm.gamma"])
    assert keys.plain == {"bert.embeddings.LayerNorm.weight": "bert.embeddings.LayerNorm.gamma"}


def test_keys_of_nothing_in_the_model_are_passed_over() -> None:
    assert not checkpoint_keys(tiny_vit(), ["vit.pooler.dense.weight", "optimizer"]).plain


def test_a_tensor_under_two_keys_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layers.0.mlp.fc1.bias and vit.layers.0.mlp.fc1.bias are both vit.layers.0"):
        checkpoint_keys(tiny_vit(), ["layers.0.mlp.fc1.bias", "vit.layers.0.mlp.fc1.bias"])


def test_joined_tensors() -> None:
    sizes: Any = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 8}
    with torch.device("meta"):
        model = MixtralForCausalLM(MixtralConfig(num_attention_heads=2, num_key_value_heads=2, **sizes))
    place = "model.layers.0.block_sparse_moe."
    stored = [f"{place}experts.{number}.w{part}.weight" for number in (0, 1) for part in (1, 2, 3)]
    keys = checkpoint_keys(model, [*stored, f"{place}gate.weight"])
    assert keys.plain == {"model.layers.0.mlp.gate.weight": f"{place}gate.weight"}
    joined = "model.layers.0.mlp.experts."
    assert keys.converted == {
        key: frozenset({joined + ("down_proj" if "w2" in key else "gate_up_proj")}) for key in stored
    }
