"""Base models in several files with adapters of them, and what merging them in memory gives."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    PreTrainedModel,
)

from peft_fps.adapter_folders.merged_folder import MergeOptions, merge
from tests.cli.saved import save_adapted
from tests.support.helpers import tiny_vit


INDEX = "model.safetensors.index.json"


def save_in_files(model: PreTrainedModel, folder: Path, size: str = "6KB") -> Path:
    """Save a model in files of at most that size."""
    model.save_pretrained(folder, max_shard_size=size)
    return folder


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """Replace the tensors in a folder by others, in one file."""
    tensors: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    (folder / INDEX).unlink(missing_ok=True)
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def reference(base: Path, adapter: Path, folder: Path, size: str = "5GB", **options: Any) -> Path:
    """Merge in memory, by the calls that the README shows."""
    auto: Any = AutoModelForImageClassification if (adapter / "vision").exists() else AutoModelForCausalLM
    options = {"dtype": "auto", "ignore_mismatched_sizes": True} | options
    model = PeftModel.from_pretrained(auto.from_pretrained(base, **options), str(adapter))
    model.merge_and_unload(safe_merge=True).save_pretrained(folder, max_shard_size=size)
    return folder


def contents(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors by name, and all JSON files but the index."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found = load_file(file)
        assert not found.keys() & tensors.keys()
        tensors |= found
    texts = {file.name: json.loads(file.read_text()) for file in folder.glob("*.json") if file.name != INDEX}
    return tensors, texts


def check_same(written: Path, expected: Path) -> None:
    tensors, texts = contents(written)
    wanted, wanted_texts = contents(expected)
    assert texts == wanted_texts
    assert tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert tensors[name].dtype == tensor.dtype, name
        assert torch.equal(tensors[name], tensor), name


def division_of(folder: Path) -> list[set[str]]:
    return [set(load_file(file)) for file in sorted(folder.glob("*.safetensors"))]


@dataclass
class Case:
    """A base model and an adapter of it on disk."""

    base: Path
    adapter: Path
    folder: Path

    def merged(self, **options: Any) -> dict[str, Any]:
        return merge(MergeOptions(self.adapter, self.folder / "out", str(self.base), overwrite=True, **options))

    def check(self, expected_dtype: str = "auto", **options: Any) -> None:
        written = self.merged(**options)
        assert written["loaded_whole"] is None
        check_same(self.folder / "out", reference(self.base, self.adapter, self.folder / "ref", dtype=expected_dtype))


def language_case(model: PreTrainedModel, folder: Path, size: str = "6KB", **options: Any) -> Case:
    base = save_in_files(model, folder / "base", size)
    save_adapted(model, folder / "adapter", base, task_type="CAUSAL_LM", **options)
    return Case(base, folder / "adapter", folder)


def vision_case(folder: Path, size: str = "20KB", **options: Any) -> Case:
    base = save_in_files(tiny_vit(), folder / "base", size)
    save_adapted(tiny_vit(), folder / "adapter", base, **options)
    (folder / "adapter" / "vision").touch()
    return Case(base, folder / "adapter", folder)


def gated_case(folder: Path, **options: Any) -> Case:
    """A model of which the file holds two linear layers of each block as one."""
    sizes: Any = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 3}
    images: Any = {"image_size": 16, "patch_size": 8, "use_swiglu_ffn": True}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Dinov2ForImageClassification(Dinov2Config(**sizes, **images)).eval()
    base = save_in_files(model, folder / "base", "20KB")
    save_adapted(model, folder / "adapter", base, **options)
    (folder / "adapter" / "vision").touch()
    return Case(base, folder / "adapter", folder)
