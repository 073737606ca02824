"""Heads trained whole: just these modules, shared ones as one, saved, loaded, merged; and what cannot be is named."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, TaskType, get_peft_model
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel, ResNetConfig

from peft_fps.base.head import find_head
from peft_fps.targets.default_targets import default_targets
from tests.support.helpers import adapted, config, fill, layers_of, normal, tiny_llama, tiny_vit, unchanged


# weight norm of the positional convolution in models of speech
pytestmark = pytest.mark.filterwarnings("ignore:.*pos_conv_embed.conv. its weight is computed:UserWarning")


# --- models ---------------------------------------------------------------------------------------------------------

FOUR = {"depths": [1, 1, 1, 1]}
TEXT: dict[str, Any] = {
    "vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16
}  # fmt: skip
DETECTOR: dict[str, Any] = {
    "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_queries": 5, "num_labels": 4,
}  # fmt: skip
SOUND: dict[str, Any] = {
    "conv_dim": [8, 8], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2, "tdnn_dim": [8, 8, 8, 8, 12], "xvector_output_dim": 6,
    **(TEXT | {"num_labels": 4}),
}  # fmt: skip


def built(kind: str, **sizes: Any) -> PreTrainedModel:
    model: Any = getattr(transformers, kind)
    return model(model.config_class(**sizes))


def resnet(*stages: int) -> ResNetConfig:
    names = [f"stage{stage}" for stage in stages]
    return ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 16, 16], layer_type="basic", out_features=names, **FOUR)


def deformable(**options: Any) -> PreTrainedModel:
    sizes = {"d_model": 32, "num_feature_levels": 3, "two_stage_num_proposals": 5, **DETECTOR, **options}
    return built("DeformableDetrForObjectDetection", backbone_config=resnet(2, 3, 4), **sizes)


def segformer() -> PreTrainedModel:
    sizes = {"hidden_sizes": [8] * 4, "num_attention_heads": [1] * 4, "decoder_hidden_size": 8, "num_labels": 4}
    return built("SegformerForSemanticSegmentation", **sizes, **FOUR)


def upernet() -> PreTrainedModel:
    sizes = {"hidden_size": 8, "auxiliary_in_channels": 16, "auxiliary_channels": 8, "num_labels": 4}
    return built("UperNetForSemanticSegmentation", backbone_config=resnet(1, 2, 3, 4), **sizes)


def yolos() -> PreTrainedModel:
    return built("YolosForObjectDetection", image_size=[32, 32], num_detection_tokens=3, **(TEXT | {"num_labels": 4}))


BUILD: dict[str, Callable[[], PreTrainedModel]] = {
    "detr": lambda: built("DetrForObjectDetection", d_model=32, backbone_config=resnet(4), **DETECTOR),
    "deformable detr": deformable,
    "deformable detr, refining": lambda: deformable(with_box_refine=True, two_stage=True),
    "dab-detr": lambda: built("DabDetrForObjectDetection", hidden_size=16, backbone_config=resnet(4), **DETECTOR),
    "yolos": yolos,
    "segformer": segformer,
    "upernet": upernet,
    "poolformer": lambda: built("PoolFormerForImageClassification", hidden_sizes=[8] * 4, **FOUR),
    "x-vector": lambda: built("Wav2Vec2ForXVector", **SOUND),
    "ctc": lambda: built("Wav2Vec2ForCTC", **SOUND, pad_token_id=0),
}
HEADS = {
    "detr": {"class_labels_classifier", "bbox_predictor"},
    "deformable detr": {"class_embed", "bbox_embed"},
    "deformable detr, refining": {
        *("class_embed", "bbox_embed", "model.decoder.class_embed", "model.decoder.bbox_embed"),
    },
    "dab-detr": {"class_embed", "bbox_predictor", "model.decoder.bbox_embed"},
    "yolos": {"class_labels_classifier", "bbox_predictor"},
    "segformer": {"decode_head"},
    "upernet": {"decode_head", "auxiliary_head"},
    "poolformer": {"norm", "classifier"},
    "x-vector": {"projector", "tdnn", "feature_extractor", "classifier", "objective"},
    "ctc": {"lm_head"},
}


def seeded(kind: str) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BUILD[kind]().eval()


def outputs(model: nn.Module, kind: str) -> list[Tensor]:
    x = normal(2, 2000) if kind in ("x-vector", "ctc") else normal(2, 3, 32, 32)
    found = model(**{"input_values" if kind in ("x-vector", "ctc") else "pixel_values": x})
    return [value for value in found.values() if isinstance(value, Tensor)]


def wrapped(model: nn.Module) -> set[str]:
    base = model.get_base_model()
    return {
        name for name, part in base.named_modules(remove_duplicate=False) if isinstance(part, ModulesToSaveWrapper)
    }


# --- just these modules ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BUILD)
def test_just_the_head_is_trained_whole(kind: str) -> None:
    """Of `x-vector`, not the backbone's `feature_extractor`; of `poolformer`, not every module that ends in `norm`."""
    base = seeded(kind)
    head = tuple(f"{head}." for head in HEADS[kind])
    expected = {name for name, _ in base.named_parameters(remove_duplicate=False) if name.startswith(head)}
    targets = default_targets(base, config(), find_head(base))
    model = adapted(base, filled=False)
    assert all(f"{name}.".startswith(head) for name in wrapped(model))
    marker = ".modules_to_save.default"
    found = {name for name, p in model.get_base_model().named_parameters(remove_duplicate=False) if marker in name}
    assert {name.replace(marker, "") for name in found} == expected
    assert targets == set(layers_of(model))
    report = model.selection_report()
    numbers = {id(p): p.numel() for n, p in model.named_parameters() if p.requires_grad}
    assert report.trained + report.head_parameters == sum(numbers.values()) == model.get_nb_trainable_parameters()[0]
    assert report.head_parameters == sum(p.numel() for n, p in model.named_parameters() if marker in n)


@pytest.mark.parametrize("kind", BUILD)
def test_an_adapter_starts_as_the_base_model_and_returns_from_file_and_merge(kind: str, tmp_path: Path) -> None:
    base = seeded(kind)
    plain, names = outputs(base, kind), [name for name, _ in base.named_parameters()]
    model = adapted(base, filled=False)
    torch.testing.assert_close(outputs(model, kind), plain)
    fill(model)
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            if parameter.requires_grad and "modules_to_save" in name:
                parameter += 0.05 * normal(*parameter.shape, seed=number)
    expected = outputs(model, kind)
    assert any(not torch.allclose(one, other) for one, other in zip(expected, plain, strict=True))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(seeded(kind), tmp_path).eval()
    assert wrapped(loaded) == wrapped(model)
    torch.testing.assert_close(outputs(loaded, kind), expected)
    model.load_adapter(tmp_path, "second")
    model.set_adapter("second")
    assert wrapped(loaded) == wrapped(model)
    torch.testing.assert_close(outputs(model.eval(), kind), expected)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(outputs(merged, kind), expected, atol=1e-4, rtol=1e-3)
    assert [name for name, _ in merged.named_parameters()] == names  # what was shared is shared again


def test_a_second_adapter_has_the_same_head() -> None:
    model = adapted(seeded("deformable detr, refining"))
    first = wrapped(model)
    model.add_adapter("second", config())
    assert wrapped(model) == first
    assert model.peft_config["second"].modules_to_save == model.peft_config["default"].modules_to_save


def test_shared_heads_are_trained_as_one() -> None:
    model = adapted(seeded("deformable detr"), filled=False)
    one, other = (model.get_base_model().class_embed[i].modules_to_save["default"] for i in (0, 1))
    assert one.weight is other.weight
    assert model.get_base_model().class_embed[0].original_module.weight is not one.weight


def test_a_list_may_be_named() -> None:
    model = adapted(seeded("deformable detr"), modules_to_save=["class_embed", "bbox_embed"])
    assert wrapped(model) == {"class_embed.0", "class_embed.1", "bbox_embed.0", "bbox_embed.1"}


def test_ends_of_names_mean_what_they_mean_in_peft() -> None:
    model = adapted(tiny_vit(), modules_to_save=["layernorm_after", "classifier"])
    assert wrapped(model) == {"vit.layers.0.layernorm_after", "vit.layers.1.layernorm_after", "classifier"}


def test_a_head_s_batch_norm_keeps_its_statistics(tmp_path: Path) -> None:
    model = adapted(seeded("segformer"))
    statistics = model.get_base_model().decode_head.batch_norm.running_mean.clone()
    outputs(model.train(), "segformer")
    moved = model.get_base_model().decode_head.batch_norm.running_mean
    assert not torch.equal(moved, statistics)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(seeded("segformer"), tmp_path)
    assert torch.equal(loaded.get_base_model().decode_head.batch_norm.running_mean, moved)


# --- language models ------------------------------------------------------------------------------------------------


def test_a_masked_language_model_s_transform_is_a_target() -> None:
    model = adapted(built("BertForMaskedLM", **TEXT))
    assert "cls.predictions.transform.dense" in layers_of(model)
    assert "cls.predictions.decoder" not in layers_of(model)
    assert wrapped(model) == set()


def test_a_layer_that_is_read_without_being_called_is_no_target() -> None:
    sizes = {"embedding_size": 8, "true_hidden_size": 8, "intra_bottleneck_size": 8, "num_feedforward_networks": 1}
    layers = layers_of(adapted(built("MobileBertForMaskedLM", **TEXT, **sizes)))
    assert "cls.predictions.transform.dense" in layers
    assert not {"cls.predictions.dense", "cls.predictions.decoder"} & set(layers)


def test_output_embeddings_stay_frozen() -> None:
    model = adapted(tiny_llama())
    assert "lm_head" not in layers_of(model)
    assert wrapped(model) == set()
    assert model.selection_report().head_parameters == 0


# --- what is left out is named --------------------------------------------------------------------------------------


def test_parameters_without_a_module_are_named() -> None:
    names = "column_output_bias, column_output_weights, output_bias and 1 more: parameters of the model's output head"
    with pytest.warns(UserWarning, match=names):
        get_peft_model(built("TapasForQuestionAnswering", **TEXT), config())


def test_a_head_that_modules_to_save_leaves_out_is_named() -> None:
    part = r"auxiliary_head: part of the model's output head, which modules_to_save=\['decode_head'\] does not name"
    with pytest.warns(UserWarning, match=rf"{part}.*modules_to_save=\['decode_head', 'auxiliary_head'\]"):
        model = get_peft_model(seeded("upernet"), config(modules_to_save=["decode_head"]))
    assert wrapped(model) == {"decode_head"}


@pytest.mark.parametrize(
    "options",
    [{"modules_to_save": []}, {"modules_to_save": ["decode_head", "auxiliary_head"]}],
)
def test_nothing_is_said_of_a_head_that_is_trained_or_refused(options: dict[str, Any]) -> None:
    assert adapted(seeded("upernet"), **options)


def test_a_head_may_be_a_target() -> None:
    model = adapted(tiny_vit(), modules_to_save=["vit.layernorm"], target_modules=["q_proj", "classifier"])
    assert "classifier" in layers_of(model)


def test_what_peft_names_for_a_task_is_completed() -> None:
    """PEFT names `classifier` and `score`; here a pooler before it is new too."""
    base = built("DebertaV2ForSequenceClassification", **TEXT)
    model = get_peft_model(base, config(task_type=TaskType.SEQ_CLS))
    assert wrapped(model) == {"pooler", "classifier"}


# --- loading into another head --------------------------------------------------------------------------------------


@pytest.mark.parametrize("door", ["from_pretrained", "load_adapter"])
def test_another_number_of_classes_is_refused_in_one_sentence(door: str, tmp_path: Path) -> None:
    adapted(tiny_vit(5)).save_pretrained(tmp_path)
    model: Any = tiny_vit(7) if door == "from_pretrained" else adapted(tiny_vit(7))
    message = (
        r"classifier\.weight: the adapter's head has 5 outputs \(shape \(5, 32\)\), expected 7 .*"
        r"Load the base model with as many classes.*Nothing was loaded"
    )
    with unchanged(model), pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(model, tmp_path) if door == "from_pretrained" else model.load_adapter(tmp_path, "x")


def test_a_module_with_an_adapter_cannot_be_trained_whole() -> None:
    model = adapted(tiny_vit(), "first")
    message = "q_proj is to be trained whole .* carries sparse changes of an"
    with unchanged(model), pytest.raises(ValueError, match=message):
        model.add_adapter("second", config(target_modules=["fc1"], modules_to_save=["q_proj"]))
