"""Tiny language models of every kind, batches of padded texts, and the same texts one by one without padding."""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BartForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.support.helpers import (
    _seeded,
    tokens,
)


Batch = dict[str, Tensor]


def tiny_opt() -> OPTForCausalLM:
    """A causal model whose layers lie in a `decoder`, though there is no encoder."""
    found = OPTConfig(
        vocab_size=50,
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    return _seeded(lambda: OPTForCausalLM(found))


def tiny_masked() -> BertForMaskedLM:
    found = BertConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    return _seeded(lambda: BertForMaskedLM(found))


def tiny_t5() -> T5ForConditionalGeneration:
    found = T5Config(
        vocab_size=50,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return _seeded(lambda: T5ForConditionalGeneration(found))


def bart_config(**options: Any) -> BartConfig:
    return BartConfig(
        vocab_size=50,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=32,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=2,
        **options,
    )


def tiny_bart() -> BartForConditionalGeneration:
    return _seeded(lambda: BartForConditionalGeneration(bart_config()))


def tiny_bart_classifier() -> BartForSequenceClassification:
    """Its decoder reads the encoder's text, shifted by one."""
    return _seeded(lambda: BartForSequenceClassification(bart_config(num_labels=3)))


def tiny_mixtral() -> MixtralForCausalLM:
    found = MixtralConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
    )
    return _seeded(lambda: MixtralForCausalLM(found))


def tiny_qwen_moe() -> Qwen2MoeForCausalLM:
    """Beside packed experts one that all tokens share, of linear layers; it reads them in a row."""
    found = Qwen2MoeConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_experts=4,
        num_experts_per_tok=2,
    )
    return _seeded(lambda: Qwen2MoeForCausalLM(found))


def tiny_switch() -> SwitchTransformersForConditionalGeneration:
    """Experts that are linear layers of their own."""
    found = SwitchTransformersConfig(
        vocab_size=50,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_sparse_encoder_layers=1,
        num_decoder_layers=2,
        num_sparse_decoder_layers=1,
        num_heads=2,
        num_experts=4,
        expert_capacity=64,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    return _seeded(lambda: SwitchTransformersForConditionalGeneration(found))


def texts(*lengths: int, seed: int = 0) -> list[Tensor]:
    return [tokens(1, length, seed=seed + number)[0] for number, length in enumerate(lengths)]


def padded(rows: list[Tensor], value: int, left: bool = False) -> Tensor:
    length = max(map(len, rows))
    filled = []
    for row in rows:
        rest = torch.full((length - len(row),), value)
        filled.append(torch.cat([rest, row] if left else [row, rest]))
    return torch.stack(filled)


def read(rows: list[Tensor], left: bool = False) -> Batch:
    """Token ids and mask, padded with a token that also occurs in texts."""
    return {"input_ids": padded(rows, 7, left), "attention_mask": padded([torch.ones_like(r) for r in rows], 0, left)}


SOURCES, TARGETS = texts(6, 3, 1, 5), texts(2, 6, 4, 3, seed=10)  # equally long when padded


SHORT = [row[:4] for row in TARGETS]  # not so


def of_one_stack(left: bool = False) -> tuple[list[Batch], list[Batch]]:
    batches = [read(texts(7, 2, 5, seed=0), left), read(texts(3, 6, seed=5), left)]
    singles = [read([row]) for row in [*texts(7, 2, 5, seed=0), *texts(3, 6, seed=5)]]
    return batches, singles


def shifted(model: PreTrainedModel, row: Tensor) -> Tensor:
    """What the decoder reads to write `row`."""
    start = torch.tensor([model.config.decoder_start_token_id])
    return torch.cat([start, row[:-1]])


def of_two_stacks(given: str, model: PreTrainedModel, targets: list[Tensor]) -> tuple[list[Batch], list[Batch]]:
    """The decoder's inputs as `given`; the singles always say them outright."""
    inputs = [shifted(model, row) for row in targets]
    pad = model.config.pad_token_id
    batch = read(SOURCES)
    if given in ("labels", "labels and inputs"):
        batch["labels"] = padded(targets, -100)
    if given in ("inputs", "labels and inputs", "inputs and mask"):
        batch["decoder_input_ids"] = padded(inputs, 7 if given == "inputs and mask" else pad)
    if given == "inputs and mask":
        batch["decoder_attention_mask"] = padded([torch.ones_like(row) for row in inputs], 0)
    singles = [
        {"input_ids": source[None], "decoder_input_ids": own[None]}
        for source, own in zip(SOURCES, inputs, strict=True)
    ]
    return [batch], singles
