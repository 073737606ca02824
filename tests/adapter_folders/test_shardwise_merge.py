"""`peft-fps merge` file by file: bit for bit what PEFT and transformers write with the whole model in memory."""

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageClassification, MixtralConfig, MixtralForCausalLM

from peft_fps.adapter_folders.merged_folder import MergeOptions, merge
from tests.adapter_folders.merges import (
    INDEX,
    Case,
    check_same,
    division_of,
    gated_case,
    language_case,
    reference,
    rewrite,
    save_in_files,
    vision_case,
)
from tests.cli.saved import save_adapted
from tests.support.helpers import tiny_bert, tiny_gpt2, tiny_llama, tiny_vit


def test_renamed_keys_norms_and_a_head_in_the_base_models_files(tmp_path: Path) -> None:
    case = vision_case(tmp_path, bias="with_norms")
    assert "vit.layers.0.mlp.fc1.weight" in tiny_vit().state_dict()
    assert not any("vit.layers.0.mlp.fc1.weight" in names for names in division_of(case.base))
    case.check()
    assert division_of(tmp_path / "out") == division_of(case.base)
    assert len(division_of(case.base)) > 2
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index == json.loads((case.base / INDEX).read_text())


def test_tied_embeddings_and_a_weight_and_its_bias_in_two_files(tmp_path: Path) -> None:
    case = language_case(tiny_gpt2(), tmp_path, "3KB")
    names = ("transformer.h.0.mlp.c_fc.weight", "transformer.h.0.mlp.c_fc.bias")
    assert not any(set(names) <= held for held in division_of(case.base))
    case.check()
    assert division_of(tmp_path / "out") == division_of(case.base)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_dtype(tmp_path: Path, dtype: Any) -> None:
    language_case(tiny_llama(), tmp_path).check(dtype, dtype=dtype)


def test_a_head_in_half_precision(tmp_path: Path) -> None:
    vision_case(tmp_path).check("bfloat16", dtype="bfloat16")


def test_a_base_in_bfloat16(tmp_path: Path) -> None:
    language_case(tiny_llama().bfloat16(), tmp_path).check()


def test_files_of_another_size(tmp_path: Path) -> None:
    case = language_case(tiny_llama(), tmp_path)
    case.merged(shard_size="12KB")
    check_same(tmp_path / "out", reference(case.base, case.adapter, tmp_path / "ref", "12KB"))
    sizes = [sum(tensor.nbytes for tensor in load_file(file).values()) for file in (tmp_path / "out").glob("model-*")]
    assert 1 < len(sizes) < len(division_of(case.base))
    assert max(sizes) <= 12_000


def test_present_names_and_keys_of_nothing_in_the_model(tmp_path: Path) -> None:
    case = vision_case(tmp_path)
    stranger = {"pooler.dense.weight": torch.ones(3)}
    rewrite(case.base, lambda _: {name: t.clone() for name, t in tiny_vit().state_dict().items()} | stranger)
    case.check()


def test_legacy_names_of_norms(tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_bert().save_pretrained(base)
    save_adapted(tiny_bert(), tmp_path / "adapter", base, bias="with_norms")

    def old(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        words = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))
        for new, former in words:
            tensors = {name.replace(new, former): tensor for name, tensor in tensors.items()}
        return tensors

    rewrite(base, old)
    case = Case(base, tmp_path / "adapter", tmp_path)
    assert case.merged()["loaded_whole"] is None
    plain = tiny_bert().from_pretrained(base)
    PeftModel.from_pretrained(plain, str(case.adapter)).merge_and_unload().save_pretrained(tmp_path / "ref")
    check_same(tmp_path / "out", tmp_path / "ref")


def test_a_backbone_gets_the_head_in_a_file_of_its_own(tmp_path: Path) -> None:
    case = vision_case(tmp_path)
    backbone = save_in_files(tiny_vit().vit, tmp_path / "backbone", "5GB")
    Case(backbone, case.adapter, tmp_path).check()
    assert [sorted(held) for held in division_of(tmp_path / "out")][1] == ["classifier.bias", "classifier.weight"]
    assert "vit.layernorm.weight" in division_of(tmp_path / "out")[0]
    merged = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert type(merged).__name__ == "ViTForImageClassification"


def test_a_head_of_another_size(tmp_path: Path) -> None:
    base = save_in_files(tiny_vit(), tmp_path / "base", "20KB")
    other = tiny_vit().__class__.from_pretrained(base, num_labels=3, ignore_mismatched_sizes=True)
    save_adapted(other, tmp_path / "adapter", base)
    (tmp_path / "adapter" / "vision").touch()
    assert Case(base, tmp_path / "adapter", tmp_path).merged()["loaded_whole"] is None
    check_same(tmp_path / "out", reference(base, tmp_path / "adapter", tmp_path / "ref", num_labels=3))
    assert division_of(tmp_path / "out") == division_of(base)


def test_tied_weights_that_the_file_holds_twice(tmp_path: Path) -> None:
    case = language_case(tiny_gpt2(), tmp_path)
    rewrite(case.base, lambda held: held | {"lm_head.weight": held["transformer.wte.weight"].clone()})
    case.check()


def test_experts_that_are_joined_on_loading_are_copied(tmp_path: Path) -> None:
    sizes: Any = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 20}
    heads: Any = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MixtralForCausalLM(MixtralConfig(**sizes, **heads))
    case = language_case(model.eval(), tmp_path, target_modules=["q_proj", "o_proj"])
    case.check("bfloat16", dtype="bfloat16")
    assert division_of(tmp_path / "out") == division_of(case.base)
    assert any("model.layers.0.block_sparse_moe.experts.1.w3.weight" in names for names in division_of(case.base))


def test_weights_that_are_split_on_loading_are_copied_where_nothing_changes(tmp_path: Path) -> None:
    gated_case(tmp_path, target_modules=["q_proj", "o_proj"]).check()


def test_a_base_in_the_cache_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, commit = language_case(tiny_llama(), tmp_path), "a" * 40
    repository = tmp_path / "cache" / "models--me--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(case.base, repository / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    written = merge(MergeOptions(case.adapter, tmp_path / "out", "me/tiny"))
    assert (written["base_model"], written["loaded_whole"]) == ("me/tiny", None)
    check_same(tmp_path / "out", reference(case.base, case.adapter, tmp_path / "ref"))
    assert division_of(tmp_path / "out") == division_of(case.base)
