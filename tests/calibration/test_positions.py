"""Masks of inputs whose positions are not those of the model's inputs, against the same data without padding."""

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from torch import Tensor, nn
from transformers import (
    FSMTConfig,
    FSMTForConditionalGeneration,
    FunnelConfig,
    FunnelModel,
    LongformerConfig,
    LongformerForSequenceClassification,
    PreTrainedModel,
    Speech2TextConfig,
    Speech2TextForConditionalGeneration,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from peft_fps import FPSConfig
from peft_fps.calibration import observe
from peft_fps.calibration.positions import Positions, fitted, positions_of
from tests.support.helpers import tokens, unchanged


REAL, LENGTH = 3, 6
SIZES: dict[str, Any] = {"vocab_size": 50, "d_model": 16}

Batch = dict[str, Tensor]


def xlnet() -> PreTrainedModel:
    return XLNetForSequenceClassification(XLNetConfig(**SIZES, n_layer=2, n_head=2, d_inner=24))


def fsmt() -> PreTrainedModel:
    sizes = {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    widths = {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "src_vocab_size": 50, "tgt_vocab_size": 50}
    config = FSMTConfig(d_model=16, langs=["de", "en"], max_position_embeddings=32, **sizes, **widths)
    return FSMTForConditionalGeneration(config)


def longformer() -> PreTrainedModel:
    config = LongformerConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        attention_window=[4, 4],
        max_position_embeddings=32,
    )
    return LongformerForSequenceClassification(config)


def padded(examples: int) -> Batch:
    mask = torch.ones(examples, LENGTH, dtype=torch.long)
    mask[:, REAL:] = 0
    return {"input_ids": tokens(examples, LENGTH).clamp(min=3), "attention_mask": mask}


def observed(model: nn.Module, batch: Batch, **options: Any) -> dict[str, tuple[Tensor, int]]:
    """Sums of |input| and numbers of positions of all layers, as a calibration has them."""
    config: dict[str, Any] = {"per_neuron": 1, "bias": "none", "modules_to_save": []}
    adapted = get_peft_model(model, FPSConfig(**config | options))
    found: dict[str, tuple[Tensor, int]] = {}

    def spied(*args: Any) -> Any:
        statistics, counts = observe(*args)
        found.update({path: (each.sums.clone(), each.positions) for path, each in statistics.items()})
        return statistics, counts

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peft_fps.importance.activation.observe", spied)
        adapted.calibrate([batch], progress=False)
    return found


@pytest.mark.parametrize("examples", [2, LENGTH], ids=["other", "as many examples as positions"])
@pytest.mark.parametrize("build", [xlnet, fsmt, longformer])
@pytest.mark.filterwarnings("ignore:Weights above 1 %")
def test_statistics_are_those_without_padding(build: Callable[[], PreTrainedModel], examples: int) -> None:
    def model() -> PreTrainedModel:
        torch.manual_seed(0)
        return build().eval()

    batch = padded(examples)
    if build is fsmt:
        batch["decoder_input_ids"] = batch["input_ids"][:, :REAL]
    alone = {key: value[:, :REAL] for key, value in batch.items()}
    found, expected = observed(model(), batch), observed(model(), alone)
    assert found.keys() == expected.keys()
    compared = [path for path in found if "global" not in path]
    assert len(compared) >= 4
    for path in compared:
        assert found[path][1] == expected[path][1], path
        torch.testing.assert_close(found[path][0], expected[path][0], rtol=1e-3, atol=1e-3, msg=path)


def wav2vec2() -> PreTrainedModel:
    config = Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        conv_dim=[8, 8],
        conv_stride=[5, 2],
        conv_kernel=[10, 3],
        num_feat_extract_layers=2,
        feat_extract_norm="layer",
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    torch.manual_seed(0)
    return Wav2Vec2ForSequenceClassification(config).eval()


@pytest.mark.filterwarnings("ignore:Weights above 1 %", "ignore:1 of 16 layers", "ignore:`is_gradient_checkpointing`")
def test_frames_of_padded_waveforms_do_not_count() -> None:
    mask = torch.ones(2, 200, dtype=torch.long)
    mask[0, 90:] = 0
    wave = torch.randn(2, 200, generator=torch.Generator().manual_seed(0)) * mask
    expected = sum(((length - 10) // 5 + 1 - 3) // 2 + 1 for length in (200, 90))
    with pytest.warns(UserWarning, match=r"of 2 modules have other positions than the attention_mask.*feature_extr"):
        found = observed(wav2vec2(), {"input_values": wave, "attention_mask": mask})
    counts = {path: count for path, (_, count) in found.items() if ".encoder.layers." in path}
    assert len(counts) == 12
    assert set(counts.values()) == {expected}


def test_steps_of_padded_spectrograms_do_not_count() -> None:
    config = Speech2TextConfig(
        vocab_size=50,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        conv_channels=16,
        input_feat_per_channel=8,
        max_target_positions=32,
        max_source_positions=64,
    )
    torch.manual_seed(0)
    model = Speech2TextForConditionalGeneration(config).eval()
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, 12:] = 0
    sound = torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(0))
    batch = {"input_features": sound, "attention_mask": mask, "decoder_input_ids": torch.full((2, 3), 5)}
    with pytest.warns(UserWarning, match=r"of 2 modules have other positions than the attention_mask.*conv_layers"):
        found = observed(model, batch)
    expected = sum(((length - 1) // 2 + 1 - 1) // 2 + 1 for length in (40, 12))
    assert found["model.encoder.layers.0.fc1"][1] == expected
    assert found["model.decoder.layers.0.encoder_attn.k_proj"][1] == expected
    assert found["model.decoder.layers.0.fc1"][1] == 6


def funnel() -> PreTrainedModel:
    config = FunnelConfig(
        **SIZES, block_sizes=[1, 1], num_decoder_layers=1, n_head=2, d_head=8, d_inner=24, max_position_embeddings=32
    )
    torch.manual_seed(0)
    return FunnelModel(config).eval()


@pytest.mark.filterwarnings("ignore:Weights above 1 %")
def test_modules_that_no_mask_fits_are_named() -> None:
    with pytest.warns(UserWarning, match="other positions than the attention_mask") as caught:
        observed(funnel(), padded(2))
    (text,) = [str(each.message) for each in caught if "attention_mask" in str(each.message)]
    named = set(re.search(r"everything else: (.*)\. Calibrate with", text)[1].split(", "))
    assert named
    assert all("blocks.1." in path for path in named)


@pytest.mark.filterwarnings("ignore:Weights above 1 %")
def test_without_padding_nothing_is_said() -> None:
    whole = {key: value[:, :REAL] for key, value in padded(2).items()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        observed(funnel(), whole)
    assert not [each for each in caught if "attention_mask" in str(each.message)]


def test_embeddings_of_a_model_that_transposes_behind_them_are_as_they_are() -> None:
    torch.manual_seed(0)
    model, batch = fsmt().eval(), padded(LENGTH)
    batch["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 1)
    batch["decoder_input_ids"] = batch["input_ids"][:, :REAL]
    ((sums, _),) = observed(model, batch, target_modules=["encoder.embed_tokens"], per_neuron=0.5).values()
    real = batch["input_ids"][:, :REAL].flatten().tolist()
    assert sums[0].tolist() == [real.count(token) for token in range(50)]


class Counts(nn.Module):
    """Counts frames as transformers' models do, in one of the forms in which they do it."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def _get_feat_extract_output_lengths(self, lengths: Tensor) -> Any:
        halved = lengths // 2
        return {"tensor": halved, "number": int(halved), "pair": (lengths, halved), "nothing": None}[self.form]


@pytest.mark.parametrize("form", ["tensor", "number", "pair", "nothing"])
def test_frames_in_whatever_form_a_model_counts_them(form: str) -> None:
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    places = positions_of(Counts(form), {"input_values": torch.ones(2, 6)}, mask)
    found = fitted(mask, torch.Size([2, 3]), "encoder", places)
    assert (None if found is None else found.int().tolist()) == (None if form == "nothing" else [[1, 1, 0], [1, 1, 1]])
    assert positions_of(Counts(form), {"input_ids": mask}, mask).frames is None
    apart = {"input_features": torch.ones(2, 6, 8), "feature_attention_mask": mask}
    assert positions_of(Counts(form), apart, mask).frames is None


class Pictured(nn.Module):
    """Texts with padding, and images with positions of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.image = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, inputs: Tensor, pixel_values: Tensor, attention_mask: Tensor) -> Tensor:
        return self.text(inputs).sum() + self.image(pixel_values.flatten(2).transpose(1, 2)).sum()


def pictured(length: int, kept: tuple[int, int], size: int) -> Batch:
    """Two texts of which so many positions are no padding, and square images."""
    mask = torch.tensor([[int(place < own) for place in range(length)] for own in kept])
    inputs, pixels = torch.ones(2, length, 4), torch.ones(2, 4, size, size)
    return {"inputs": inputs, "pixel_values": pixels, "attention_mask": mask}


@pytest.mark.parametrize(
    ("length", "kept", "size"),
    [(3, 2, 5), (9, 3, 3), (4, 3, 3)],
    ids=["another length", "as many as the images' positions", "as many as their channels"],
)
def test_positions_of_images_are_no_padding(length: int, kept: int, size: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = observed(Pictured(), pictured(length, (kept, length), size))
    assert {path: count for path, (_, count) in found.items()} == {"text": kept + length, "image": 2 * size**2}


def test_a_mask_that_leaves_nothing_is_refused() -> None:
    model = get_peft_model(Pictured(), FPSConfig(per_neuron=1, target_modules=["text"], modules_to_save=[]))
    with unchanged(model), pytest.raises(ValueError, match="^text: every position of every batch is padding"):
        model.calibrate([pictured(3, (0, 0), 5)], progress=False)


@given(st.integers(1, 5), st.integers(1, 7), st.integers(1, 4), st.booleans())
def test_a_mask_takes_the_order_and_number_of_positions(batch: int, length: int, multiple: int, first: bool) -> None:
    mask = torch.arange(batch * length).view(batch, length)
    places = Positions(re.compile("late") if first else None, multiple)
    total = -(-length // multiple) * multiple
    rows = [[*row, *[0] * (total - length)] for row in mask.tolist()]
    columns = [list(column) for column in zip(*rows, strict=True)]
    for shape, form, natural in (((batch, total), rows, not first), ((total, batch), columns, first)):
        found = fitted(mask, torch.Size(shape), "late.layer", places)
        assert found is not None
        if batch != total or natural:
            assert found.tolist() == form
    flat = fitted(mask, torch.Size([batch * total]), "late.layer", places)
    if total > 1 and batch * total != batch * length:
        assert flat is not None
        assert flat.reshape(-1).tolist() == sum(columns if first else rows, [])
    assert fitted(mask, torch.Size([batch + 11, total + 13]), "late.layer", places) is None
