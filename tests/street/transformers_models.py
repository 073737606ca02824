"""Models of transformers with tiny configs, by a name of their own."""

from collections.abc import Callable
from typing import Any

import transformers as hf
from torch import Tensor, nn

from tests.street.lifecycle import Case
from tests.support.helpers import normal, tokens


def pixels(size: int = 32, channels: int = 3) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"pixel_values": normal(2, channels, size, size)}


def text(**more: Callable[[], Tensor]) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"input_ids": tokens(2, 7)} | {name: make() for name, make in more.items()}


def of(kind: Any, config: Any, **options: Any) -> Callable[[], nn.Module]:
    """A model of a class name or class, with a config of a class name and its options."""
    made: Any = getattr(hf, config) if isinstance(config, str) else config
    return lambda: (getattr(hf, kind) if isinstance(kind, str) else kind)(made(**options))


WIDTH = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = WIDTH | {"image_size": 32, "patch_size": 8, "num_labels": 3}
TEXT = WIDTH | {"vocab_size": 50, "max_position_embeddings": 32}
STAGES = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 3}
CAUSAL = TEXT | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
CLIP_VISION = {key: VISION[key] for key in (*WIDTH, "image_size", "patch_size")}
WAVES = WIDTH | {
    "conv_dim": (16, 16),
    "conv_kernel": (4, 4),
    "conv_stride": (2, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "vocab_size": 12,
    "layerdrop": 0.0,
    "mask_time_prob": 0.0,
}


IMAGES: dict[str, Case] = {
    "vit": Case(of("ViTForImageClassification", "ViTConfig", **VISION), pixels()),
    "deit": Case(of("DeiTForImageClassificationWithTeacher", "DeiTConfig", **VISION), pixels()),
    "dinov2": Case(of("Dinov2ForImageClassification", "Dinov2Config", mlp_ratio=2, **VISION), pixels()),
    "beit": Case(of("BeitForImageClassification", "BeitConfig", **VISION), pixels()),
    "swin": Case(
        of(
            "SwinForImageClassification",
            "SwinConfig",
            image_size=32,
            patch_size=4,
            embed_dim=8,
            depths=[1, 1],
            num_heads=[2, 2],
            window_size=4,
            num_labels=3,
        ),
        pixels(),
    ),
    "convnext": Case(
        of("ConvNextForImageClassification", "ConvNextConfig", hidden_sizes=[8, 16], depths=[1, 1], num_stages=2),
        pixels(),
    ),
    "resnet": Case(of("ResNetForImageClassification", "ResNetConfig", **STAGES), pixels()),
    "regnet": Case(of("RegNetForImageClassification", "RegNetConfig", groups_width=4, **STAGES), pixels()),
    "bit": Case(
        of(
            "BitForImageClassification",
            "BitConfig",
            embedding_size=8,
            hidden_sizes=[32, 64],
            depths=[1, 1],
            num_groups=4,
            num_labels=3,
        ),
        pixels(),
    ),
    "mobilenet-v1": Case(
        of("MobileNetV1ForImageClassification", "MobileNetV1Config", depth_multiplier=0.25, min_depth=4), pixels()
    ),
    "mobilenet-v2": Case(
        of("MobileNetV2ForImageClassification", "MobileNetV2Config", depth_multiplier=0.2, min_depth=4), pixels()
    ),
    "levit": Case(
        of(
            "LevitForImageClassificationWithTeacher",
            "LevitConfig",
            image_size=64,
            hidden_sizes=[16, 24, 32],
            num_attention_heads=[2, 2, 2],
            depths=[1, 1, 1],
            key_dim=[8, 8, 8],
        ),
        pixels(64),
    ),
    "clip": Case(
        of(
            "CLIPForImageClassification",
            "CLIPConfig",
            text_config=TEXT,
            vision_config=CLIP_VISION,
            projection_dim=16,
            num_labels=3,
        ),
        pixels(),
    ),
    "siglip": Case(
        of("SiglipForImageClassification", "SiglipConfig", text_config=TEXT, vision_config=CLIP_VISION, num_labels=3),
        pixels(),
        unused=r"vision_model\.head",  # pools, for others than the classifier
    ),
    "segformer": Case(
        of(
            "SegformerForSemanticSegmentation",
            "SegformerConfig",
            hidden_sizes=[8, 16],
            depths=[1, 1],
            num_encoder_blocks=2,
            sr_ratios=[2, 1],
            patch_sizes=[7, 3],
            strides=[4, 2],
            num_attention_heads=[1, 2],
            mlp_ratios=[2, 2],
            decoder_hidden_size=16,
            num_labels=3,
        ),
        pixels(),
    ),
    "yolos": Case(
        of("YolosForObjectDetection", "YolosConfig", num_detection_tokens=4, **(VISION | {"image_size": [32, 32]})),
        pixels(),
    ),
    "videomae": Case(
        of("VideoMAEForVideoClassification", "VideoMAEConfig", num_frames=2, tubelet_size=2, **VISION),
        lambda: {"pixel_values": normal(2, 2, 3, 32, 32)},
    ),
}

TEXTS: dict[str, Case] = {
    "bert-answers": Case(of("BertForQuestionAnswering", "BertConfig", **TEXT), text()),
    "bert-choices": Case(
        of("BertForMultipleChoice", "BertConfig", **TEXT), lambda: {"input_ids": tokens(4, 7).view(2, 2, 7)}
    ),
    "bert-masked": Case(of("BertForMaskedLM", "BertConfig", **TEXT), text()),
    "roberta": Case(of("RobertaForTokenClassification", "RobertaConfig", num_labels=3, **TEXT), text()),
    "deberta": Case(of("DebertaV2ForSequenceClassification", "DebertaV2Config", num_labels=3, **TEXT), text()),
    "llama": Case(of("LlamaForCausalLM", "LlamaConfig", **CAUSAL), text()),
    "qwen-moe": Case(
        of(
            "Qwen3MoeForCausalLM",
            "Qwen3MoeConfig",
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            num_key_value_heads=1,
            head_dim=16,
            **CAUSAL,
        ),
        text(),
    ),
    "mamba": Case(
        of("MambaForCausalLM", "MambaConfig", vocab_size=50, hidden_size=16, num_hidden_layers=2, state_size=4),
        text(),
        idle=True,  # weights of conv1d and dt_proj are read past the layers
    ),
    "gpt-neox": Case(of("GPTNeoXForCausalLM", "GPTNeoXConfig", **CAUSAL), text()),
    "t5": Case(
        of(
            "T5ForConditionalGeneration",
            "T5Config",
            vocab_size=50,
            d_model=16,
            d_ff=24,
            d_kv=8,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
        ),
        text(decoder_input_ids=lambda: tokens(2, 5)),
    ),
    "wav2vec2": Case(
        of("Wav2Vec2ForCTC", "Wav2Vec2Config", **WAVES),
        lambda: {"input_values": normal(2, 200)},
        left_out=True,  # the positional convolution, whose weight is normalised
    ),
    "encodec": Case(
        of(
            "EncodecModel",
            "EncodecConfig",
            norm_type="time_group_norm",
            num_filters=4,
            hidden_size=16,
            codebook_dim=16,
            upsampling_ratios=[2, 2],
            num_lstm_layers=1,
            num_residual_layers=1,
            codebook_size=16,
            target_bandwidths=[24.0],
        ),
        lambda: {"input_values": normal(2, 1, 64)},
        unused=r"model\.encoder",  # the codes cut off the gradient
    ),
    "whisper": Case(
        of(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            vocab_size=50,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            num_mel_bins=8,
            max_source_positions=10,
            max_target_positions=16,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
            suppress_tokens=None,
        ),
        lambda: {"input_features": normal(2, 8, 20), "decoder_input_ids": tokens(2, 5)},
    ),
}

MODELS = IMAGES | TEXTS
