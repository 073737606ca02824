"""Masks of a batch by name, in the forms that models take them, and those that are not understood."""

import warnings
from typing import Any

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    BertForSequenceClassification,
    DetrConfig,
    DetrForObjectDetection,
    PreTrainedModel,
    ResNetConfig,
    Siglip2Config,
    Siglip2ForImageClassification,
    Siglip2TextConfig,
    Siglip2VisionConfig,
)

from peft_fps import FPSConfig, calibrate
from peft_fps.calibration.batch_masks import CROSS_ATTENTION, FOREIGN, mask_named, mask_of_inputs, unread_masks
from tests.calibration.naive_fps import selection_of
from tests.support.helpers import normal
from tests.support.language_models import tiny_t5


REAL, LENGTH = 4, 9
KEPT = [[1] * REAL + [0] * (LENGTH - REAL), [1] * LENGTH]
MASK = torch.tensor(KEPT)
CAUSAL = torch.ones(LENGTH, LENGTH).tril()
LARGE = torch.finfo(torch.float32).min


def pairs(mask: Tensor) -> Tensor:
    """Which position, `(batch, positions, positions)`, reads which, in both directions."""
    return mask[:, None, :].expand(-1, mask.shape[1], -1)


FORMS = {
    "positions": MASK,
    "pairs": pairs(MASK),
    "heads": pairs(MASK)[:, None].expand(-1, 3, -1, -1),
    "bool": pairs(MASK)[:, None].bool(),
    "causal": (pairs(MASK) * CAUSAL)[:, None],
    "added": (1.0 - pairs(MASK)[:, None] * CAUSAL) * LARGE,
    "added, the old way": (1.0 - pairs(MASK)[:, None].float()) * -10000,
    "padding that reads itself": pairs(MASK) * MASK[..., None] | torch.eye(LENGTH, dtype=torch.long),
    "added to positions": torch.where(MASK == 0, LARGE, 0.0),
    "added with a bias of both signs": torch.where(pairs(MASK)[:, None] == 1, CAUSAL - 0.5, LARGE),
    "added with a bias by distance": torch.where(pairs(MASK)[:, None] == 1, CAUSAL - 8, -torch.inf),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_mask_in_any_form_says_which_positions_count(form: str) -> None:
    assert mask_named({"attention_mask": FORMS[form]}, "attention_mask").int().tolist() == KEPT


@pytest.mark.parametrize("mask", [torch.zeros(2, 1, 5, 5), torch.ones(2, 1, 5, 5), torch.ones(1, 5, 5).tril()])
def test_without_padding_all_positions_of_pairs_count(mask: Tensor) -> None:
    """Zeros are added to scores, ones allow a pair."""
    found = mask_named({"attention_mask": mask}, "attention_mask")
    assert found.int().tolist() == [[1] * 5] * len(mask)


@pytest.mark.parametrize(
    "texts", [{"input_ids": torch.ones(1, 2, LENGTH)}, {"inputs_embeds": torch.ones(1, 2, LENGTH, 4)}]
)
def test_several_texts_per_example_are_so_many_sequences(texts: dict[str, Tensor]) -> None:
    assert mask_named(texts | {"attention_mask": MASK.view(1, 2, LENGTH)}, "attention_mask").tolist() == KEPT


def test_as_many_texts_as_tokens_are_no_pairs() -> None:
    mask = torch.ones(2, 3, 3).tril()
    found = mask_named({"inputs_embeds": torch.ones(2, 3, 3, 4), "attention_mask": mask}, "attention_mask")
    assert torch.equal(found, mask.view(6, 3))


def test_one_position_that_reads_itself_counts() -> None:
    assert mask_named({"attention_mask": torch.ones(2, 1, 1, 1)}, "attention_mask").tolist() == [[True], [True]]


@pytest.mark.parametrize("mask", [torch.ones(2, 1, 3, 5), torch.ones(5), torch.ones(1, 1, 1, 5, 5), "no tensor", None])
def test_other_forms_are_no_mask(mask: Any) -> None:
    assert mask_named({"attention_mask": mask}, "attention_mask") is None


@pytest.mark.parametrize(
    ("batch", "name", "kept"),
    [
        ({"attention_mask": MASK, "pixel_attention_mask": 1 - MASK}, "attention_mask", KEPT),
        ({"src_key_padding_mask": MASK == 0}, "src_key_padding_mask", KEPT),
        ({"key_padding_mask": (1.0 - MASK) * -torch.inf}, "key_padding_mask", None),  # 0 times infinity is no number
        ({"key_padding_mask": torch.where(MASK == 0, -torch.inf, 0.0)}, "key_padding_mask", KEPT),
        ({"pixel_attention_mask": MASK}, "pixel_attention_mask", KEPT),
        ({"pixel_attention_mask": MASK, "input_ids": MASK}, "attention_mask", None),
        ({"pixel_attention_mask": MASK.view(2, 1, 3, 3)}, "pixel_attention_mask", None),
        ({}, "pixel_attention_mask", None),
        ({"src_key_padding_mask": MASK == 0, "tgt": torch.ones(2, 3, 4)}, "pixel_attention_mask", None),
    ],
)
def test_the_mask_of_the_inputs(batch: dict[str, Any], name: str, kept: list[list[int]] | None) -> None:
    found, mask = mask_of_inputs(batch)
    assert found == name
    if kept is not None:
        assert mask.int().tolist() == kept


@pytest.mark.parametrize(
    ("batch", "read", "unread"),
    [
        ({"pixel_mask": torch.ones(2, 4, 4)}, set(), set()),
        ({"pixel_mask": torch.eye(4).expand(2, 4, 4)}, set(), {"pixel_mask"}),
        ({"padding_mask": MASK, "attention_mask": MASK}, {"attention_mask"}, {"padding_mask"}),
        ({"global_attention_mask": MASK, "past_observed_mask": MASK, "bool_masked_pos": MASK}, set(), set()),
        ({"tgt_key_padding_mask": MASK == 0}, set(), {"tgt_key_padding_mask"}),
        ({"padding_mask": torch.ones(0, 3), "pixel_mask": None, "input_features_mask": "no"}, set(), set()),
    ],
)
def test_masks_that_are_not_understood(batch: dict[str, Any], read: set[str], unread: set[str]) -> None:
    assert set(unread_masks(batch, read)) == unread


def test_whom_a_mask_concerns() -> None:
    """Beside texts a mask of images concerns the modules that read images; alone, all."""
    alone = unread_masks({"pixel_mask": MASK}, set())
    beside = unread_masks({"pixel_mask": MASK, "input_ids": MASK}, set())
    assert alone == {"pixel_mask": None}
    assert [bool(beside["pixel_mask"].search(path)) for path in ("vision_model.fc1", "text_model.fc1")] == [
        True,
        False,
    ]


# --- in models ------------------------------------------------------------------------------------------------------

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def chosen(model: PreTrainedModel, batch: dict[str, Any]) -> tuple[Any, list[str]]:
    """The selection, and what calibration warned of."""
    adapted = get_peft_model(model.eval(), FPSConfig(per_neuron=2, modules_to_save=[], target_modules="all-linear"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapted.calibrate([batch], progress=False)
    return selection_of(adapted), [text for each in caught if "positions" in (text := str(each.message))]


def siglip2() -> PreTrainedModel:
    vision = Siglip2VisionConfig(**SMALL, num_patches=16, patch_size=4)
    text = Siglip2TextConfig(**SMALL, vocab_size=50)
    torch.manual_seed(0)
    return Siglip2ForImageClassification(
        Siglip2Config(vision_config=vision.to_dict(), text_config=text.to_dict(), num_labels=3)
    )


def bert(kind: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return kind(BertConfig(**SMALL, vocab_size=50))


pytestmark = pytest.mark.filterwarnings("ignore:Weights above 1 %", "ignore:`is_gradient_checkpointing`")


def test_patches_that_pad_images_do_not_count() -> None:
    mask = (torch.arange(16) < 4).long().expand(3, 16)
    images = normal(3, 16, 48) * mask[..., None]
    batch = {"pixel_values": images, "pixel_attention_mask": mask, "spatial_shapes": torch.tensor([[2, 2]] * 3)}
    alone = batch | {"pixel_values": images[:, :4], "pixel_attention_mask": mask[:, :4]}
    assert chosen(siglip2(), batch) == (chosen(siglip2(), alone)[0], [])


@pytest.mark.parametrize("form", ["pairs of heads", "several texts"])
def test_padding_of_texts_does_not_count_whatever_form_its_mask_has(form: str) -> None:
    tokens = torch.randint(1, 50, (4, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(LENGTH) < REAL).long().expand(4, LENGTH)
    batch, alone = {"input_ids": tokens * mask}, {"input_ids": tokens[:, :REAL]}
    kind = BertForSequenceClassification
    if form == "several texts":
        batch, alone = ({key: value.view(2, 2, -1) for key, value in each.items()} for each in (batch, alone))
        batch["attention_mask"] = mask.view(2, 2, LENGTH)
        kind = BertForMultipleChoice
    else:
        batch["attention_mask"] = pairs(mask)[:, None].bool()
    assert chosen(bert(kind), batch) == (chosen(bert(kind), alone)[0], [])


class Encoder(nn.Module):
    """PyTorch's layers, with the mask that its documentation names."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 3)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)

    def forward(self, src: Tensor, src_key_padding_mask: Tensor) -> Tensor:
        return self.second(self.layer(self.first(src), src_key_padding_mask=src_key_padding_mask)).mean()


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_mask_in_torchs_form_is_read(batch_first: bool) -> None:
    mask = (torch.arange(LENGTH) >= REAL).expand(3, LENGTH)
    x = normal(3, LENGTH, 8)
    found = []
    for length in (LENGTH, REAL):
        part = x[:, :length] if batch_first else x[:, :length].transpose(0, 1)
        model = get_peft_model(Encoder(batch_first), FPSConfig(per_neuron=2, target_modules=["first", "second"]))
        model.calibrate([{"src": part, "src_key_padding_mask": mask[:, :length]}], progress=False)
        found.append(selection_of(model))
    assert found[0] == found[1]


class Translation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)
        self.model.encoder.use_nested_tensor = False

    def forward(self, src: Tensor, tgt: Tensor, **masks: Tensor) -> Tensor:
        return self.model(src, tgt, **masks).mean()


def test_masks_of_two_sequences_in_torchs_form_are_named() -> None:
    padding = (torch.arange(LENGTH) >= REAL).expand(3, LENGTH)
    names = ("src_key_padding_mask", "tgt_key_padding_mask", "memory_key_padding_mask")
    batch = {"src": normal(3, LENGTH, 8), "tgt": normal(3, LENGTH, 8, seed=1)}
    model = get_peft_model(Translation(), FPSConfig(per_neuron=2, modules_to_save=[]))
    with pytest.warns(UserWarning, match=f"of 10 modules have other positions than the {', '.join(names)}, "):
        model.calibrate([batch | dict.fromkeys(names, padding)], progress=False)


def t5(inside: str) -> tuple[nn.Module, nn.Module]:
    """A model whose decoder has an adapter: the whole, and the part that was adapted."""
    model = tiny_t5()
    inject_adapter_in_model(
        FPSConfig(per_neuron=2, target_modules=["wi", "wo", "q", "v"]), model.get_submodule(inside)
    )
    return model, model.get_submodule(inside)


def test_of_an_adapter_in_a_part_the_whole_model_says_what_its_layers_read() -> None:
    """The decoder's own mask counts there, also where both masks have one shape."""
    tokens = torch.randint(2, 40, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    lengths = [(9, 4), (5, 9), (7, 6)]
    masks = [torch.arange(LENGTH) < torch.tensor([pair[side] for pair in lengths])[:, None] for side in (0, 1)]
    both = [tokens * mask for mask in masks]
    batch = {"input_ids": both[0], "attention_mask": masks[0].long()}
    batch |= {"decoder_input_ids": both[1], "decoder_attention_mask": masks[1].long()}
    alone = [
        {"input_ids": both[0][row : row + 1, :long], "decoder_input_ids": both[1][row : row + 1, :short]}
        for row, (long, short) in enumerate(lengths)
    ]
    found = []
    for data in ([batch], alone):
        whole, part = t5("decoder")
        calibrate(whole, data, progress=False)
        found.append(selection_of(part))
    assert found[0] == found[1]


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = (nn.Sequential(nn.Linear(8, 8)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x)


def test_adapters_of_one_name_in_two_parts_are_refused_and_of_two_names_are_calibrated() -> None:
    same, apart = Pair(), Pair()
    for part in ("left", "right"):
        options = FPSConfig(per_neuron=2, target_modules=["0"])
        inject_adapter_in_model(options, getattr(same, part))
        inject_adapter_in_model(options, getattr(apart, part), adapter_name=part)
    x = normal(4, 8)
    with pytest.raises(ValueError, match=r"Several parts .* adapter 'default' each, .*left\.0.* adapter_name="):
        calibrate(same, [x], progress=False)
    for part in ("left", "right"):
        report = calibrate(apart, [x], adapter_name=part, progress=False)
        assert report.entries == 16


def detr() -> PreTrainedModel:
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    torch.manual_seed(0)
    return DetrForObjectDetection(
        DetrConfig(
            use_timm_backbone=False,
            backbone_config=backbone,
            backbone=None,
            use_pretrained_backbone=False,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            num_queries=3,
            num_labels=3,
        )
    )


def test_a_mask_of_pixels_is_named() -> None:
    mask = torch.ones(2, 32, 32, dtype=torch.long)
    images = normal(2, 3, 32, 32)
    _, said = chosen(detr(), {"pixel_values": images, "pixel_mask": mask})
    assert said == []
    mask[0, :, 20:] = 0
    _, (text,) = chosen(detr(), {"pixel_values": images * mask[:, None], "pixel_mask": mask})
    assert "modules have other positions than the pixel_mask, (2, " in text
    assert "model.encoder.layers.0." in text
    assert "of one length or size" in text


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("decoder.transformer.h.0.crossattention.c_attn", True),
        ("decoder.transformer.h.0.crossattention.q_attn", False),
        ("decoder.transformer.h.0.crossattention.c_proj", False),
        ("decoder.layer.0.encoder_decoder_attention.attention.key", True),
        ("decoder.layer.0.encoder_decoder_attention.attention.query", False),
        ("decoder.layer.0.self_attention.attention.key", False),
    ],
)
def test_which_modules_of_a_decoder_read_the_encoders_states(path: str, expected: bool) -> None:
    assert (CROSS_ATTENTION.search(path) is not None) == expected


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("vision_language_model.encoder.layer.0.attention", False),
        ("vision_language_model.vision_tower.layer.0", True),
        ("lxmert.encoder.x_layers.0.visual_attention.att.query", False),
        ("vision_model.layers.0", True),
    ],
)
def test_which_modules_read_images(path: str, expected: bool) -> None:
    assert (FOREIGN.search(path) is not None) == expected
