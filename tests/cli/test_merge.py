"""`peft-fps merge`: what it writes is the base model plus the changes, entry by entry."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, PreTrainedModel, ViTModel

from tests.cli.saved import check_user_error, edit_config, edit_json, edit_tensors, run, save_adapted, save_base
from tests.support.helpers import dense_reference, images, tiny_llama, tiny_mlp, tiny_vit, tokens


PROCESSOR = "preprocessor_config.json"


@dataclass(frozen=True)
class Folders:
    """Those of a base model beside its processor, of an adapter of it with a trained head, and of what is merged."""

    base: Path
    adapter: Path
    output: Path
    adapted: nn.Module

    def merge(self, *options: object) -> Result:
        return run("merge", self.adapter, "--output", self.output, *options)


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    base = save_base(tiny_vit(), tmp_path / "base")
    (base / PROCESSOR).write_text('{"from": "base"}')
    model = save_adapted(tiny_vit(), tmp_path / "adapter", base)
    return Folders(base, tmp_path / "adapter", tmp_path / "out", model)


def logits(model: nn.Module, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(**inputs).logits


def merged_in(folder: Path) -> PreTrainedModel:
    return AutoModelForImageClassification.from_pretrained(folder)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_model_is_the_base_plus_the_changes_and_nothing_of_the_adapter_is_left(folders: Folders) -> None:
    result = folders.merge()
    assert result.exit_code == 0, result.output
    assert f"saved in {folders.output}" in result.stdout
    assert files(folders.output) == ["config.json", "model.safetensors", PROCESSOR]
    assert json.loads((folders.output / PROCESSOR).read_text()) == {"from": "base"}
    merged = merged_in(folders.output)
    expected = dict(dense_reference(tiny_vit(), folders.adapted, ["default"]).named_parameters())
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-6, atol=1e-6)
    assert not torch.equal(logits(merged, pixel_values=images()), logits(tiny_vit(), pixel_values=images()))
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (folders.output, folders.base))
    assert {key: tensor.shape for key, tensor in ours.items()} == {key: t.shape for key, t in theirs.items()}
    configs = [json.loads((folder / "config.json").read_text()) for folder in (folders.output, folders.base)]
    assert configs[0] == configs[1]


def test_json_is_all_there_is_on_stdout(folders: Folders) -> None:
    found = json.loads(folders.merge("--json").stdout)
    layers = json.loads(run("inspect", folders.adapter, "--json").stdout)["modules"]
    assert found["merged_entries"] == sum(row["entries"] for row in layers)
    assert found["merged_biases"] == sum(row["biases"] for row in layers)
    assert found["class"] == "ViTForImageClassification"
    assert found["dtype"] == "float32"
    assert found["copied"] == [PROCESSOR]
    assert found["loaded_whole"] is None
    assert found["replaced_whole"] == ["classifier.bias", "classifier.weight"]
    assert found["bytes"] == sum(path.stat().st_size for path in folders.output.iterdir())


def test_a_language_model_in_bfloat16_in_several_files(tmp_path: Path) -> None:
    base = save_base(tiny_llama(), tmp_path / "base")
    (base / "tokenizer.json").write_text("the base's")
    (base / "tokenizer_config.json").write_text("the base's")
    (base / "training_args.bin").write_text("of nobody's interest")
    model = save_adapted(tiny_llama(), tmp_path / "adapter", task_type="CAUSAL_LM")
    (tmp_path / "adapter" / "tokenizer.json").write_text("the adapter's")
    arguments = ("--base", base, "--output", tmp_path / "out", "--dtype", "bfloat16", "--shard-size", "8KB")
    result = run("merge", tmp_path / "adapter", *arguments, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["class"] == "LlamaForCausalLM"
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "the adapter's"
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == "the base's"
    assert not (tmp_path / "out" / "training_args.bin").exists()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.dtype == torch.bfloat16
    plain = tiny_llama().to(torch.bfloat16)
    expected = dense_reference(plain.float(), model, ["default"]).to(torch.bfloat16)
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(merged.get_parameter(name), parameter, rtol=0, atol=0)
    assert torch.isfinite(logits(merged, input_ids=tokens())).all()


def test_the_head_is_as_large_as_the_adapters(folders: Folders) -> None:
    other = type(tiny_vit()).from_pretrained(folders.base, num_labels=3, ignore_mismatched_sizes=True)
    model = save_adapted(other, folders.adapter, folders.base)
    assert folders.merge().exit_code == 0
    merged = merged_in(folders.output)
    assert merged.config.num_labels == 3
    found, expected = (logits(each, pixel_values=images()) for each in (merged, model))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_names_of_classes_are_kept_where_they_fit(folders: Folders) -> None:
    edit_json(folders.base / "config.json", id2label={str(number): f"bird {number}" for number in range(5)})
    assert folders.merge().exit_code == 0
    assert merged_in(folders.output).config.id2label == {number: f"bird {number}" for number in range(5)}


def test_a_backbone_is_enough_if_the_adapter_has_the_head(folders: Folders, tmp_path: Path) -> None:
    backbone = save_base(tiny_vit().vit, tmp_path / "backbone")
    assert ViTModel.from_pretrained(backbone).config.architectures == ["ViTModel"]
    result = folders.merge("--base", backbone)
    assert result.exit_code == 0, result.output
    save_adapted(tiny_vit(), folders.adapter, modules_to_save=[])
    message = check_user_error(folders.merge("--base", backbone, "--overwrite"))
    assert "lacks 2 weights of a ViTForImageClassification" in message
    assert "classifier.bias, classifier.weight" in message


def test_an_output_folder_is_replaced_whole_or_left(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    output, around = folders.output, folders.output.parent
    output.mkdir()
    (output / "mine.txt").write_text("mine")
    assert "is not empty" in check_user_error(folders.merge())
    assert files(output) == ["mine.txt"]

    def full(self: PreTrainedModel, folder: Path, **options: Any) -> None:
        (folder / "config.json").write_text("half")
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", full)
        assert "no space left" in check_user_error(folders.merge("--overwrite"))
    assert files(output) == ["mine.txt"]
    assert files(around) == ["adapter", "base", "out"]
    assert folders.merge("--overwrite").exit_code == 0
    assert files(output) == ["config.json", "model.safetensors", PROCESSOR]
    assert files(around) == ["adapter", "base", "out"]
    inside = replace(folders, output=around).merge("--overwrite")
    assert "which is to be replaced, but is or holds" in check_user_error(inside)
    file = replace(folders, output=folders.base / "config.json").merge()
    assert "which is a file" in check_user_error(file)


def test_what_cannot_be_merged_is_refused_and_nothing_is_written(folders: Folders, tmp_path: Path) -> None:
    def refusal(*options: object, code: int = 1) -> str:
        message = check_user_error(folders.merge(*options), code)
        assert not folders.output.exists()
        return message

    llama = save_base(tiny_llama(), tmp_path / "llama")
    assert "it is a llama model, and the adapter was made from a ViTForImageClassification" in refusal("--base", llama)
    wide = tiny_vit().config
    wide.intermediate_size = 80
    other = save_base(type(tiny_vit())(wide), tmp_path / "wide")
    assert "mlp.fc1" in refusal("--base", other)
    stranger = tiny_vit()
    with torch.no_grad():
        stranger.vit.layers[0].mlp.fc1.weight += 1
    assert "The adapter was made from another base model" in refusal("--base", save_base(stranger, tmp_path / "str"))
    assert "no such file or folder" in refusal("--base", tmp_path / "nowhere")
    assert "device" in refusal("--device", "abacus")
    edit_config(folders.adapter, base_model_name_or_path=str(tmp_path / "gone"))
    assert "which --base replaces" in refusal()
    edit_config(folders.adapter, base_model_name_or_path=None)
    assert "does not record its base model" in refusal()
    edit_tensors(folders.adapter, {"classifier.bias": torch.full((5,), torch.nan)})
    assert "is damaged: heads" in refusal("--base", folders.base)
    refusal("--dtype", "int8", code=2)
    check_user_error(run("merge", folders.adapter), code=2)


def test_nothing_that_a_config_names_is_imported(folders: Folders) -> None:
    edit_config(folders.adapter, auto_mapping={"base_model_class": "system", "parent_library": "os"})
    edit_json(folders.base / "config.json", architectures=["Trainer"])
    message = check_user_error(folders.merge())
    assert "The model's class is system or Trainer, expected one of transformers" in message


def test_a_model_that_is_none_of_transformers_is_refused(tmp_path: Path) -> None:
    save_adapted(tiny_mlp(), tmp_path / "adapter", tmp_path, target_modules=["first"])
    assert "could not be loaded" in check_user_error(run("merge", tmp_path / "adapter", "--output", tmp_path / "out"))
