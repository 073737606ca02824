"""Padding that models and loops of others tell in ways of their own: what calibration reads, and what it names.

What a model does not read, the content of padding, must not change a selection.
"""

import warnings
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    EncoderDecoderModel,
    GPT2Config,
    GPT2LMHeadModel,
    SpeechT5Config,
    SpeechT5ForTextToSpeech,
)

from peft_fps import FPSConfig
from peft_fps.calibration.batch_padding import padding_of
from peft_fps.calibration.padding import Padding
from tests.calibration.naive_fps import selection_of
from tests.support.helpers import normal


SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
LENGTH, REAL = 20, 5
MASK = (torch.arange(LENGTH) < torch.tensor([[LENGTH], [REAL], [REAL], [REAL]])).long()


def tokens(seed: int, low: int = 1) -> Tensor:
    return torch.randint(low, 50, MASK.shape, generator=torch.Generator().manual_seed(seed))


FIRST = tokens(0)
SECOND = torch.where(MASK == 1, FIRST, tokens(1))  # another content of the padding alone


def bert(kind: Any = BertForSequenceClassification) -> Any:
    return kind(BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))


def chosen(build: Any, batch: Any, **options: Any) -> tuple[Any, list[str]]:
    """The entries that a batch selects, without embeddings of tokens, and what was warned of masks."""
    torch.manual_seed(0)
    model = get_peft_model(build(), FPSConfig(per_neuron=3, modules_to_save=[]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.calibrate([batch], progress=False, **options)
    texts = [str(each.message) for each in caught]
    return selection_of(model), [text for text in texts if "have other positions than" in text]


class Wrapper(nn.Module):
    """Makes the mask itself, of tokens whose number is not zero."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.out = bert(BertModel), nn.Linear(16, 2)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        mask = (ids != 0).long() if mask is None else mask
        result: Tensor = self.out(self.body(ids, attention_mask=mask)[0][:, 0])
        return result


class Towers(Wrapper):
    def forward(  # type: ignore[override]
        self, query: Tensor, query_mask: Tensor, doc: Tensor, doc_mask: Tensor
    ) -> Tensor:
        sides = (self.body(ids, attention_mask=mask)[0][:, 0] for ids, mask in ((query, query_mask), (doc, doc_mask)))
        result: Tensor = self.out(sum(sides))
        return result


class Nested(Wrapper):
    def forward(self, inputs: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(inputs["input_ids"], inputs["attention_mask"])


class Plain(nn.Module):
    """No model of transformers inside."""

    def __init__(self) -> None:
        super().__init__()
        self.look_up, self.first, self.out = nn.Embedding(50, 16), nn.Linear(16, 16), nn.Linear(16, 2)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        states = self.first(self.look_up(ids)) * mask[..., None]
        result: Tensor = self.out(states.sum(1) / mask.sum(1, keepdim=True))
        return result


CLIENTS: dict[str, tuple[Any, Any]] = {
    "a tuple": (bert, lambda ids: (ids, MASK, torch.zeros(4))),
    "a tuple for a model of one's own": (Wrapper, lambda ids: (ids, MASK, torch.zeros(4))),
    "a mask of another name": (Wrapper, lambda ids: {"ids": ids, "mask": MASK}),
    "two texts": (
        Towers,
        lambda ids: {"query": ids, "query_mask": MASK, "doc": ids.flip(0), "doc_mask": MASK.flip(0)},
    ),
    "a mapping inside": (Nested, lambda ids: {"inputs": {"input_ids": ids, "attention_mask": MASK}}),
}


@pytest.mark.parametrize("client", CLIENTS)
def test_the_content_of_padding_does_not_count(client: str) -> None:
    build, batch_of = CLIENTS[client]
    both = [FIRST, SECOND]
    if client.startswith("a tuple"):  # in which one token pads
        both = [torch.where(MASK == 1, FIRST.clamp(1, 48), token) for token in (0, 49)]
    found = [chosen(build, batch_of(ids)) for ids in both]
    assert found[0] == found[1]
    assert found[0][1] == []


def test_a_model_that_makes_its_mask_itself_is_calibrated_with_it() -> None:
    ids = torch.where(MASK == 1, FIRST, 0)
    alone = [{"ids": ids[:1]}, *({"ids": row[None, :REAL]} for row in ids[1:])]
    torch.manual_seed(0)
    apart = get_peft_model(Wrapper(), FPSConfig(per_neuron=3, modules_to_save=[]))
    apart.calibrate(alone, progress=False)
    together, _ = chosen(Wrapper, {"ids": ids})
    found = selection_of(apart)
    layers = {path for path in together if path.startswith("body.encoder")}
    assert layers
    assert {path: together[path] for path in layers} == {path: found[path] for path in layers}


def test_a_mask_of_another_name_that_nobody_reads_is_named() -> None:
    _, (text,) = chosen(Plain, {"ids": FIRST, "mask": MASK})
    assert "have other positions than the mask, (4, 20, 16)" in text
    assert "first" in text
    assert chosen(Plain, {"ids": FIRST, "mask": torch.ones_like(MASK)})[1] == []


def test_labels_of_tokens_do_not_go_to_the_model() -> None:
    labels = torch.randint(0, 2, MASK.shape, generator=torch.Generator().manual_seed(3))
    assert chosen(bert, (FIRST, labels)) == chosen(bert, {"input_ids": FIRST})


def speech() -> Any:
    return SpeechT5ForTextToSpeech(
        SpeechT5Config(
            vocab_size=50,
            hidden_size=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            num_mel_bins=8,
            speech_decoder_prenet_units=8,
            speech_decoder_postnet_units=8,
            speech_decoder_postnet_layers=2,
            speaker_embedding_dim=8,
            encoder_max_relative_position=10,
        )
    )


def test_the_name_of_a_model_tells_nothing_of_what_its_modules_read() -> None:
    """`speecht5` stands before all paths, also before those of its encoder of texts."""
    sound = {"speaker_embeddings": normal(4, 8), "labels": normal(4, 12, 8)}
    padding = padding_of({"input_ids": FIRST, "attention_mask": MASK} | sound, speech())
    assert padding.foreign
    assert not padding.reads_foreign("speecht5.encoder.wrapped_encoder.layers.0.attention.k_proj")
    assert padding.reads_foreign("speecht5.decoder.speech_prenet.layers.0")
    assert Padding(foreign=True).reads_foreign("speecht5.encoder.wrapped_encoder.layers.0.attention.k_proj")
    found = [chosen(speech, {"input_ids": ids, "attention_mask": MASK} | sound) for ids in (FIRST, SECOND)]
    texts = {path for path in found[0][0] if ".encoder." in path and "wrapped" in path}
    assert texts
    assert {path: found[0][0][path] for path in texts} == {path: found[1][0][path] for path in texts}


def test_a_decoder_that_projects_keys_and_values_together_reads_the_encoders_mask() -> None:
    decoder = GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32, add_cross_attention=True)

    def build() -> Any:
        model = EncoderDecoderModel(encoder=bert(BertModel), decoder=GPT2LMHeadModel(decoder))
        model.config.decoder_start_token_id, model.config.pad_token_id = 1, 0
        return model

    own = MASK.flip(0)
    rest = {"attention_mask": MASK, "decoder_attention_mask": own}
    rest["decoder_input_ids"] = torch.where(own == 1, FIRST, 0)
    found = [chosen(build, {"input_ids": ids} | rest) for ids in (FIRST, SECOND)]
    assert any("crossattention.c_attn" in path for path in found[0][0])
    assert found[0] == found[1]


class TwoTowers(nn.Module):
    """A tower of images, whose root is `vision_model`, beside texts of as many positions as it has patches."""

    def __init__(self) -> None:
        super().__init__()
        sizes: Any = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        self.tower = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=16, patch_size=8))
        self.body, self.out = bert(BertModel), nn.Linear(16, 2)

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        texts = self.body(input_ids, attention_mask=attention_mask)[0][:, 0]
        result: Tensor = self.out(texts + self.tower(pixel_values=pixel_values).pooler_output)
        return result


def test_a_tower_of_images_has_no_padding_of_texts() -> None:
    ids = FIRST[:, :5]  # as many as patches and class token
    pixels, found = normal(4, 3, 16, 16), []
    for mask in (torch.ones_like(ids), (torch.arange(5) < torch.tensor([[5], [2], [2], [2]])).long()):
        selected, said = chosen(TwoTowers, {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask})
        assert said == []
        found.append({path: rows for path, rows in selected.items() if path.startswith("tower.")})
    assert found[0]
    assert found[0] == found[1]
