"""The table of inert biases against autograd: in tiny models, no such bias has a gradient, and others have one."""

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, ResNetConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from peft_fps.targets.inert_biases import KEY_PROJECTIONS, has_inert_bias, inert_biases
from tests.support.helpers import tiny_vit


# models warn of settings that do not matter here
pytestmark = pytest.mark.filterwarnings("ignore")

HEADS = (
    *("num_attention_heads", "encoder_attention_heads", "decoder_attention_heads", "n_heads", "n_head"),
    *("decoder_num_attention_heads", "num_key_value_heads"),
)
WIDTHS = (
    *("hidden_size", "intermediate_size", "d_model", "dim", "hidden_dim", "emb_dim", "n_embd", "ffn_dim", "dff"),
    *("encoder_ffn_dim", "decoder_ffn_dim", "decoder_hidden_size", "decoder_intermediate_size", "embedding_size"),
    *("embed_dim", "word_embed_proj_dim", "projection_dim"),
)
LAYERS = ("num_hidden_layers", "encoder_layers", "decoder_layers", "n_layers", "n_layer", "decoder_num_hidden_layers")
SMALL = (
    dict.fromkeys(HEADS, 2)
    | dict.fromkeys(WIDTHS, 16)
    | dict.fromkeys(LAYERS, 1)
    | {"vocab_size": 40, "max_position_embeddings": 32, "max_2d_position_embeddings": 40, "image_size": 32}
    | {"patch_size": 8, "window_size": 2, "num_queries": 4}
    | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 2, "depths": [1, 1]}
    | {"conv_dim": [8, 8], "conv_kernel": [4, 4], "conv_stride": [2, 2], "num_feat_extract_layers": 2}
    | {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "layerdrop": 0.0}
)
"""Values of those fields that a config has, in configs of parts too."""

STAGES = {"num_encoder_blocks": 2, "hidden_sizes": [8, 16], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]}
SCALED = STAGES | {"sr_ratios": [2, 1], "patch_sizes": [7, 3], "strides": [4, 2]}
WINDOWS = {"num_heads": [2, 2], "embed_dim": 8, "patch_size": 4}
ESM = {"vocab_size": 40, "pad_token_id": 0, "mask_token_id": 39}
DETECTOR = {
    "backbone_config": ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], out_features=["stage2"])
}
DECODER = {"is_decoder": True, "add_cross_attention": True}


def has(name: str, kind: str, **fields: Any) -> tuple[str, str, dict[str, Any]]:
    return name, kind, fields


ENTRIES = [
    has("vit", "ViTAttention.k_proj"),
    has("deit", "DeiTAttention.k_proj"),
    has("dinov2", "Dinov2Attention.k_proj"),
    has("dinov2_with_registers", "Dinov2WithRegistersAttention.k_proj"),
    has("vit_mae", "ViTMAEAttention.k_proj"),
    has("vit_msn", "ViTMSNAttention.k_proj"),
    has("ijepa", "IJepaAttention.k_proj"),
    has("vivit", "VivitAttention.k_proj", num_frames=2, tubelet_size=[2, 8, 8]),
    has("audio-spectrogram-transformer", "ASTAttention.k_proj", max_length=24, num_mel_bins=16),
    has("dpt", "DPTSelfAttention.key"),
    has("yolos", "YolosSelfAttention.key", image_size=[32, 32]),
    has("vilt", "ViltSelfAttention.key"),
    has("clip", "CLIPAttention.k_proj"),
    has("clipseg", "CLIPSegAttention.k_proj"),
    has("chinese_clip", "ChineseCLIPTextSelfAttention.key ChineseCLIPVisionAttention.k_proj"),
    has("altclip", "AltRobertaSelfAttention.key AltCLIPAttention.k_proj"),
    has("owlvit", "OwlViTAttention.k_proj"),
    has("owlv2", "Owlv2Attention.k_proj"),
    has("groupvit", "GroupViTAttention.k_proj"),
    has("siglip_vision_model", "SiglipAttention.k_proj"),
    has("siglip2_vision_model", "Siglip2Attention.k_proj", num_patches=16),
    has("idefics3_vision", "Idefics3VisionAttention.k_proj"),
    has("smolvlm_vision", "SmolVLMVisionAttention.k_proj"),
    has("blip", "BlipTextSelfAttention.key"),
    has("git", "GitSelfAttention.key GitVisionAttention.k_proj"),
    has("bert", "BertSelfAttention.key BertCrossAttention.key", **DECODER),
    has("bert-generation", "BertGenerationSelfAttention.key"),
    has("roberta", "RobertaSelfAttention.key RobertaCrossAttention.key", **DECODER),
    has("xlm-roberta", "XLMRobertaSelfAttention.key XLMRobertaCrossAttention.key", **DECODER),
    has("xlm-roberta-xl", "XLMRobertaXLSelfAttention.key"),
    has("camembert", "CamembertSelfAttention.key"),
    has("electra", "ElectraSelfAttention.key"),
    has("distilbert", "DistilBertSelfAttention.k_lin"),
    has("albert", "AlbertAttention.key"),
    has("mpnet", "MPNetSelfAttention.k"),
    has("data2vec-text", "Data2VecTextSelfAttention.key"),
    has("data2vec-audio", "Data2VecAudioAttention.k_proj"),
    has("ernie", "ErnieSelfAttention.key"),
    has("megatron-bert", "MegatronBertSelfAttention.key"),
    has("mobilebert", "MobileBertSelfAttention.key"),
    has("layoutlm", "LayoutLMSelfAttention.key"),
    has("lilt", "LiltSelfAttention.key LiltSelfAttention.layout_key", channel_shrink_ratio=2, hidden_size=24),
    has("markuplm", "MarkupLMSelfAttention.key"),
    has("rembert", "RemBertSelfAttention.key"),
    has("splinter", "SplinterSelfAttention.key"),
    has("squeezebert", "SqueezeBertSelfAttention.key"),
    has("tapas", "TapasSelfAttention.key"),
    has("convbert", "ConvBertSelfAttention.key"),
    has("roberta-prelayernorm", "RobertaPreLayerNormSelfAttention.key"),
    has("visual_bert", "VisualBertSelfAttention.key"),
    has("esm", "EsmSelfAttention.key", **ESM, position_embedding_type="absolute"),
    has("xlm", "MultiHeadAttention.k_lin"),
    has("flaubert", "MultiHeadAttention.k_lin"),
    has("ctrl", "MultiHeadAttention.Wk"),
    has("bart", "BartAttention.k_proj"),
    has("mbart", "MBartAttention.k_proj"),
    has("pegasus", "PegasusAttention.k_proj"),
    has("marian", "MarianAttention.k_proj"),
    has("blenderbot", "BlenderbotAttention.k_proj"),
    has("blenderbot-small", "BlenderbotSmallAttention.k_proj"),
    has("m2m_100", "M2M100Attention.k_proj"),
    has("plbart", "PLBartAttention.k_proj"),
    has("opt", "OPTAttention.k_proj"),
    has("biogpt", "BioGptAttention.k_proj"),
    has("wav2vec2", "Wav2Vec2Attention.k_proj"),
    has("hubert", "HubertAttention.k_proj"),
    has("wavlm", "WavLMAttention.k_proj"),
    has("unispeech", "UniSpeechAttention.k_proj"),
    has("unispeech-sat", "UniSpeechSatAttention.k_proj"),
    has("sew", "SEWAttention.k_proj"),
    has("segformer", "SegformerAttention.k_proj", **SCALED),
    has("glpn", "GLPNEfficientSelfAttention.key", **SCALED),
    has("pvt", "PvtEfficientSelfAttention.key", **STAGES, sequence_reduction_ratios=[2, 1], patch_sizes=[4, 2]),
    has("pvt_v2", "PvtV2SelfAttention.key", **SCALED),
    has("swin", "SwinAttention.k_proj", **WINDOWS),
    has("donut-swin", "DonutSwinSelfAttention.key", **WINDOWS),
    has("detr", "DetrSelfAttention.k_proj DetrCrossAttention.k_proj", **DETECTOR),
    has("table-transformer", "TableTransformerAttention.k_proj", **DETECTOR),
]

OTHERS = [
    has("esm", "EsmSelfAttention.key", **ESM, position_embedding_type="rotary"),
    has("roformer", "RoFormerSelfAttention.key"),
    has("qwen2", "Qwen2Attention.k_proj"),
    has("gpt_oss", "GptOssAttention.k_proj", head_dim=8, num_local_experts=2, num_experts_per_tok=1),  # sinks
    has("deberta-v2", "DisentangledSelfAttention.key_proj", relative_attention=True, pos_att_type=["p2c", "c2p"]),
    has("groupvit", "GroupViTAssignAttention.k_proj"),  # softmax over queries, so that keys compete
]


def shrink(config: PreTrainedConfig, fields: dict[str, Any]) -> None:
    for name, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            shrink(value, fields)
        elif value is not None and name in SMALL and name not in fields:
            setattr(config, name, SMALL[name])
    for name, value in fields.items():
        setattr(config, name, value)


def ran_backward(name: str, fields: dict[str, Any]) -> nn.Module:
    """A tiny model in float64 with random weights and biases, with the gradients of a random sum of its outputs."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[name]()
    shrink(config, fields)
    model = AutoModel.from_config(config, attn_implementation="eager", experts_implementation="eager").double().eval()
    for parameter in model.parameters():
        noise = torch.randn_like(parameter)
        parameter.data = noise * 0.3 + 0.5 if parameter.dim() < 2 else noise * parameter.shape[1:].numel() ** -0.5
    outputs = model(**inputs(name, model, config))
    sum((output * torch.randn_like(output)).sum() for output in floating(outputs)).backward()
    return model


def inputs(name: str, model: Any, config: Any) -> dict[str, Tensor]:
    """Random inputs, with padding where the model takes a mask."""
    taken = inspect.signature(model.forward).parameters
    tokens, mask = torch.randint(3, 39, (2, 7)), torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    random = {
        "input_ids": tokens,
        "decoder_input_ids": tokens.flip(1),
        "pixel_values": torch.randn(2, 3, 32, 32, dtype=torch.float64),
        "bbox": torch.randint(0, 20, (2, 7, 4)).sort(-1).values,
        "attention_mask": mask,
    }
    if getattr(config, "add_cross_attention", False):
        random["encoder_hidden_states"] = torch.randn(2, 4, 16, dtype=torch.float64)
    if "input_ids" not in taken:
        random.pop("attention_mask")
    if "input_values" in taken and "input_ids" not in taken:
        random["input_values"] = torch.randn(2, 120, dtype=torch.float64)
        random["attention_mask"] = (torch.arange(120) < torch.tensor([[120], [80]])).long()
    if name == "audio-spectrogram-transformer":
        random = {"input_values": torch.randn(2, 24, 16, dtype=torch.float64)}
    if name == "vivit":
        random["pixel_values"] = random["pixel_values"][:, None].expand(-1, 2, -1, -1, -1)
    if name == "siglip2_vision_model":
        random["pixel_values"] = torch.randn(2, 16, 192, dtype=torch.float64)
        random["pixel_attention_mask"] = (torch.arange(16) < torch.tensor([[16], [8]])).long()
        random["spatial_shapes"] = torch.tensor([[4, 4], [2, 4]])
    return {key: value for key, value in random.items() if key in taken}


def floating(outputs: Any) -> Iterator[Tensor]:
    if isinstance(outputs, Tensor):
        yield from [outputs] if outputs.requires_grad else []
    elif isinstance(outputs, (dict, list, tuple)):
        for output in outputs.values() if isinstance(outputs, dict) else outputs:
            yield from floating(output)


def gradients(model: nn.Module, kinds: str) -> dict[str, list[tuple[str, float]]]:
    """Paths of the named projections and how large the gradient of their bias is beside those of their siblings."""
    found: dict[str, list[tuple[str, float]]] = {kind: [] for kind in kinds.split()}
    for path, attention in model.named_modules():
        for kind in found:
            owner, _, own = kind.partition(".")
            key = getattr(attention, own, None) if type(attention).__name__ == owner else None
            if key is not None and key.bias.grad is not None:  # another copy of the class is not called
                siblings = [getattr(child, "bias", None) for name, child in attention.named_children() if name != own]
                largest = max(
                    bias.grad.abs().max().item() for bias in siblings if getattr(bias, "grad", None) is not None
                )
                assert largest > 1e-3
                found[kind].append((f"{path}.{own}", key.bias.grad.abs().max().item() / largest))
    return found


@pytest.mark.parametrize(("name", "kinds", "fields"), ENTRIES, ids=[name for name, *_ in ENTRIES])
def test_biases_of_the_table_have_no_gradient(name: str, kinds: str, fields: dict[str, Any]) -> None:
    model = ran_backward(name, fields)
    for kind, found in gradients(model, kinds).items():
        assert found, kind
        for path, size in found:
            assert size < 1e-6, path  # many models have softmax in float32
            assert has_inert_bias(model, path)


def test_every_entry_is_compared_with_autograd() -> None:
    table = KEY_PROJECTIONS["transformers"]
    entered = {f"{kind}.{name}" for name, kinds in table.items() for kind in kinds}
    assert entered == {kind for _, kinds, _ in ENTRIES for kind in kinds.split()}


@pytest.mark.parametrize(("name", "kinds", "fields"), OTHERS, ids=[name for name, *_ in OTHERS])
def test_biases_that_have_a_gradient_are_not_in_the_table(name: str, kinds: str, fields: dict[str, Any]) -> None:
    model = ran_backward(name, fields)
    for kind, found in gradients(model, kinds).items():
        assert found, kind
        for path, size in found:
            assert size > 1e-3, path
            assert not has_inert_bias(model, path)


def test_keys_beside_those_of_a_prompt_are_trained() -> None:
    """The prompt's keys lack the bias, so that it tells them from the others."""
    model = ran_backward("mvp", {"use_prompt": True, "prompt_length": 4, "prompt_mid_dim": 8})
    found = dict(gradients(model, "MvpAttention.k_proj")["MvpAttention.k_proj"])
    assert max(found.values()) > 1e-3
    assert not any(has_inert_bias(model, path) for path in found)


@pytest.mark.parametrize(
    ("module", "kind", "name", "options", "shape"),
    [
        ("timm.models.cait", "ClassAttn", "k", {"dim": 8, "num_heads": 2, "qkv_bias": True}, (2, 5, 8)),
        ("timm.models.crossvit", "CrossAttention", "wk", {"dim": 8, "num_heads": 2, "qkv_bias": True}, (2, 5, 8)),
        ("timm.layers", "AttentionPool2d", "k", {"in_features": 8, "feat_size": 3, "num_heads": 2}, (2, 8, 3, 3)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_those_of_timm(module: str, kind: str, name: str, options: dict[str, Any], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    own = {"qkv_separate": True, "qkv_bias": True} if kind == "AttentionPool2d" else {}
    model = nn.Sequential(getattr(pytest.importorskip(module), kind)(**options, **own)).double()
    output = model(torch.randn(shape, dtype=torch.float64))
    (output * torch.randn_like(output)).sum().backward()
    [(path, size)] = gradients(model, f"{kind}.{name}")[f"{kind}.{name}"]
    assert size < 1e-12
    assert has_inert_bias(model, path)
    assert name in KEY_PROJECTIONS["timm"]


def test_only_what_is_known_to_be_softmax_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_vit()
    names = [name for name, module in model.named_modules() if getattr(module, "bias", None) is not None]
    keys = {f"vit.layers.{block}.attention.k_proj" for block in (0, 1)}
    assert inert_biases(model, names) == keys
    attention = model.vit.layers[0].attention
    attention.forward = lambda *args, **kwargs: attention(*args, **kwargs)
    assert inert_biases(model, names) == {"vit.layers.1.attention.k_proj"}
    model.config._attn_implementation = "of-my-own"
    assert inert_biases(model, names) == frozenset()
    other = tiny_vit()
    other.vit.layers[0].attention.__class__ = type("ViTAttention", (type(attention),), {"__module__": "mine"})
    assert inert_biases(other, names) == {"vit.layers.1.attention.k_proj"}
