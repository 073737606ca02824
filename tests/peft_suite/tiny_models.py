"""Tiny random models, tokenizer and image processor that stand in for the hub repositories PEFT's tests load.

Sizes follow the public repositories (layer count, heads, odd widths such as 37), because some tests depend on them;
vocabularies are shortened, as the tests only feed the token ids 0 to 2.
"""

import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers


VOCAB_SIZE = 300

# the one adapter repository: PEFT's config tests load a LoRA config from this revision, whatever the method
ADAPTER_REPO = "peft-internal-testing/tiny-opt-lora-revision"
ADAPTER_REVISION = "test"


@dataclass(frozen=True)
class TinyModel:
    """What to build for one hub repository.

    Attributes:
        auto_class: name of the transformers auto class the tests load the repository with.
        model_type: transformers model type of the config.
        config: config values that differ from the defaults of the model type.
        tokenizer: whether a tokenizer is needed.
        image_processor: whether an image processor is needed.
    """

    auto_class: str
    model_type: str
    config: dict[str, Any] = field(default_factory=dict)
    tokenizer: bool = False
    image_processor: bool = False


_BERT = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "max_position_embeddings": 512,
}
_GPT2 = {"vocab_size": VOCAB_SIZE, "n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 512, "bos_token_id": 98,
         "eos_token_id": 98, "pad_token_id": 98}  # fmt: skip
_LLAMA = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
}

TINY_MODELS: dict[str, TinyModel] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": TinyModel(
        "AutoModelForCausalLM",
        "opt",
        {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 16,
            "word_embed_proj_dim": 16,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "ffn_dim": 4,
            "max_position_embeddings": 100,
        },
        tokenizer=True,
    ),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": TinyModel("AutoModelForCausalLM", "gpt2", _GPT2),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": TinyModel(
        "AutoModelForCausalLM", "gptj", {**_GPT2, "rotary_dim": 4}
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": TinyModel("AutoModelForCausalLM", "llama", _LLAMA),
    "peft-internal-testing/tiny-dummy-qwen2": TinyModel(
        "AutoModelForCausalLM",
        "qwen2",
        {**_LLAMA, "hidden_size": 8, "num_key_value_heads": 2, "intermediate_size": 32},
    ),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": TinyModel(
        "AutoModelForCausalLM", "gemma3_text", {**_LLAMA, "head_dim": 8, "num_key_value_heads": 2}
    ),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": TinyModel(
        "AutoModelForSeq2SeqLM",
        "t5",
        {
            "vocab_size": VOCAB_SIZE,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 37,
            "num_layers": 5,
            "num_heads": 4,
            "relative_attention_num_buckets": 8,
            "decoder_start_token_id": 0,
        },
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": TinyModel(
        "AutoModelForSeq2SeqLM",
        "bart",
        {
            "vocab_size": VOCAB_SIZE,
            "d_model": 16,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 4,
            "decoder_ffn_dim": 4,
            "max_position_embeddings": 100,
        },
    ),
    "peft-internal-testing/tiny-random-BertModel": TinyModel("AutoModel", "bert", _BERT),
    "peft-internal-testing/tiny-random-RobertaModel": TinyModel("AutoModel", "roberta", _BERT),
    "peft-internal-testing/tiny-random-DebertaModel": TinyModel(
        "AutoModel", "deberta", {**_BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
    ),
    "peft-internal-testing/tiny-random-DebertaV2Model": TinyModel(
        "AutoModel", "deberta-v2", {**_BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
    ),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": TinyModel(
        "AutoModelForSequenceClassification", "bert", _BERT
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": TinyModel(
        "AutoModelForSequenceClassification", "roberta", _BERT
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": TinyModel(
        "AutoModelForSequenceClassification", "llama", {**_LLAMA, "num_labels": 1}
    ),
    "peft-internal-testing/tiny-random-ResNetForImageClassification": TinyModel(
        "AutoModelForImageClassification",
        "resnet",
        {"embedding_size": 10, "hidden_sizes": [10, 20, 30, 40], "depths": [1, 1, 2, 1], "num_labels": 3},
        image_processor=True,
    ),
}


def _tokenizer(max_length: int) -> transformers.PreTrainedTokenizerFast:
    """Return a byte-level tokenizer without merges; its 256 symbols and two special tokens fit in `VOCAB_SIZE`."""
    symbols = ["<s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="<s>", pad_token="<pad>", model_max_length=max_length
    )


def save_tiny_model(repo_id: str, folder: Path) -> None:
    """Build the stand-in for `repo_id` and save it like a hub snapshot into `folder`."""
    spec = TINY_MODELS[repo_id]
    config = transformers.AutoConfig.for_model(spec.model_type, **spec.config)
    with torch.random.fork_rng():
        torch.manual_seed(zlib.crc32(repo_id.encode()))
        model = getattr(transformers, spec.auto_class).from_config(config)
    model.save_pretrained(folder)
    if spec.tokenizer:
        _tokenizer(config.max_position_embeddings).save_pretrained(folder)
    if spec.image_processor:
        transformers.ConvNextImageProcessorPil(size={"shortest_edge": 224}).save_pretrained(folder)


def save_lora_config(folder: Path) -> None:
    """Save the stand-in for the config of `ADAPTER_REPO` into `folder`."""
    LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]).save_pretrained(str(folder))
