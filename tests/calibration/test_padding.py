"""Masks of a batch: given ones as they are, and those of a decoder whose inputs come from somewhere else."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from peft_fps.calibration.batch_padding import padding_of
from peft_fps.calibration.padding import Padding, is_padding_unknown, mask_of, mask_of_tokens
from tests.support.language_models import tiny_t5


class Model(nn.Module):
    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(**config)


SEQ2SEQ = Model(is_encoder_decoder=True, pad_token_id=0)

MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
OWN = torch.tensor([[1, 1], [1, 0]])
LABELS = torch.tensor([[5, 6, -100], [7, -100, -100]])
INPUTS = torch.tensor([[0, 5, 6], [0, 7, 0]])


def listed(mask: Tensor | None) -> list[list[int]] | None:
    return None if mask is None else mask.int().tolist()


@pytest.mark.parametrize("batch", [torch.ones(2, 3), None, [], "text", {}], ids=repr)
@pytest.mark.parametrize("model", [None, nn.Identity(), Model(is_encoder_decoder=False)], ids=str)
def test_without_masks_every_position_counts(batch: Any, model: nn.Module | None) -> None:
    assert padding_of(batch, model) == Padding(None, None, separate=False)


@pytest.mark.parametrize("model", [None, nn.Identity(), Model(is_encoder_decoder=False)], ids=str)
def test_given_masks_are_taken_as_they_are(model: nn.Module | None) -> None:
    found = padding_of({"attention_mask": MASK, "decoder_attention_mask": OWN, "labels": LABELS}, model)
    assert found.inputs is MASK
    assert found.decoder is OWN
    assert not found.separate
    # whose labels say nothing of a decoder
    assert padding_of({"attention_mask": MASK, "labels": LABELS}, model).decoder is None


@pytest.mark.parametrize(
    "mask", [torch.ones(2, 1, 3, 4), torch.ones(4), [[1, 1]], None], ids=["not square", "1d", "list", "none"]
)
def test_masks_of_other_forms_are_left_aside(mask: Any) -> None:
    assert padding_of({"attention_mask": mask, "decoder_attention_mask": mask}, None) == Padding()


DECODERS: dict[str, tuple[dict[str, Any], list[list[int]] | None]] = {
    "own mask first": ({"decoder_attention_mask": OWN, "labels": LABELS, "decoder_input_ids": INPUTS}, OWN.tolist()),
    "labels": ({"labels": LABELS}, [[1, 1, 0], [1, 0, 0]]),
    "labels before inputs": (
        {"labels": LABELS, "decoder_input_ids": torch.tensor([[0, 5, 0], [0, 0, 0]])},
        [[1, 1, 0], [1, 0, 0]],
    ),
    "inputs, which may begin with padding": ({"decoder_input_ids": INPUTS}, [[1, 1, 1], [1, 1, 0]]),
    "inputs of nothing but padding": ({"decoder_input_ids": torch.zeros(2, 3)}, [[1, 0, 0], [1, 0, 0]]),
    "a skipped label within a text": ({"labels": torch.tensor([[-100, 5, -100, 6, -100]])}, [[1, 1, 1, 1, 0]]),
    "no label at all": ({"labels": torch.full((1, 3), -100)}, [[0, 0, 0]]),
    "classes are no texts": ({"labels": torch.tensor([1, 2])}, MASK.tolist()),
    "nor are several classes each": ({"labels": torch.ones(2, 4)}, MASK.tolist()),
    "labels of another shape": (
        {"labels": torch.tensor([[1, -100], [1, -100]]), "decoder_input_ids": INPUTS},
        [[1, 1, 1], [1, 1, 0]],
    ),
    "inputs made of the encoder's": ({}, MASK.tolist()),
    "embeddings, whose padding is unknown": ({"decoder_inputs_embeds": torch.ones(2, 4, 8)}, None),
}


@pytest.mark.parametrize("case", DECODERS)
def test_of_a_decoder(case: str) -> None:
    batch, expected = DECODERS[case]
    found = padding_of({"attention_mask": MASK, **batch}, SEQ2SEQ)
    assert found.inputs is MASK
    assert found.separate
    assert listed(found.decoder) == expected


@pytest.mark.parametrize("config", [{}, {"pad_token_id": None}], ids=repr)
def test_inputs_without_a_known_padding_token_all_count(config: dict[str, Any]) -> None:
    assert padding_of({"decoder_input_ids": INPUTS}, Model(is_encoder_decoder=True, **config)).decoder is None


@given(st.lists(st.lists(st.sampled_from([-100, 3, 4]), min_size=5, max_size=5), min_size=1, max_size=4))
def test_exactly_the_closing_run_of_ignored_labels_is_padding(rows: list[list[int]]) -> None:
    expected = [[int(any(label != -100 for label in row[place:])) for place in range(5)] for row in rows]
    labels = torch.tensor(rows)
    assert listed(padding_of({"labels": labels}, SEQ2SEQ).decoder) == expected
    assert labels.tolist() == rows


class Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


def test_a_model_of_transformers_inside_says_whether_there_is_a_decoder() -> None:
    assert padding_of({"labels": LABELS}, Outer(tiny_t5())).separate
    assert not padding_of({"labels": LABELS}, Outer(nn.Linear(2, 2))).separate


TEXTS = {"input_ids": MASK, "attention_mask": MASK}
PICTURES = {"pixel_values": torch.ones(2, 3, 4, 4), "pixel_mask": torch.eye(4).expand(2, 4, 4)}


@pytest.mark.parametrize(
    ("batch", "path", "length", "unknown"),
    [
        (TEXTS | PICTURES, "encoder.query", 9, True),  # texts and images as one sequence
        (TEXTS | PICTURES, "vision_model.query", 3, True),
        (TEXTS | PICTURES, "encoder.query", 3, False),  # of the images, and none of the texts
        (TEXTS | {"pixel_values": PICTURES["pixel_values"]}, "encoder.query", 9, True),
        (TEXTS | {"pixel_values": PICTURES["pixel_values"]}, "vision_model.query", 9, False),
        ({**TEXTS, **PICTURES, "attention_mask": torch.ones(2, 4)}, "encoder.query", 9, True),
        ({"input_ids": MASK, "attention_mask": torch.ones(2, 4)}, "encoder.query", 9, False),
    ],
)
def test_where_padding_is_unknown_beside_images(batch: Any, path: str, length: int, unknown: bool) -> None:
    assert is_padding_unknown(torch.ones(2, length, 8), padding_of(batch, None), path) == unknown


# --- which mask an input has ----------------------------------------------------------------------------------------

SEPARATE = Padding(MASK, OWN, separate=True)
TOGETHER = Padding(MASK, OWN)


@pytest.mark.parametrize(
    ("shape", "path", "padding", "expected"),
    [
        ((2, 4), "words", TOGETHER, MASK),
        ((8,), "words", TOGETHER, MASK),
        ((1, 4), "positions", TOGETHER, MASK),
        ((4,), "positions", TOGETHER, MASK),
        ((2, 2), "decoder.words", TOGETHER, OWN),
        ((2, 2), "words", TOGETHER, OWN),
        ((2, 2), "words", SEPARATE, None),
        ((2, 4), "decoder.words", SEPARATE, None),
        ((2, 5), "words", TOGETHER, None),
        ((2, 4), "relative_attention_bias", TOGETHER, None),
    ],
)
def test_masks_of_tokens(shape: tuple[int, ...], path: str, padding: Padding, expected: Tensor | None) -> None:
    assert mask_of_tokens(torch.zeros(shape, dtype=torch.int64), padding, path) is expected
    if len(shape) == 2 and shape[0] > 1 and "relative" not in path:
        assert mask_of(torch.zeros(*shape, 3), padding, path) is expected


@pytest.mark.parametrize(
    "path", ["qformer.encoder.layer.0.crossattention.attention.query", "x.0.intermediate_query.dense"]
)
def test_learned_queries_have_no_padding(path: str) -> None:
    """Also where they are as many as a text has tokens."""
    padding, states = Padding(MASK, foreign=True), torch.ones(*MASK.shape, 16)
    assert mask_of(states, padding, path) is None
    assert not is_padding_unknown(states, padding, path)
    assert mask_of(states, padding, "qformer.encoder.layer.0.attention.attention.query") is not None
