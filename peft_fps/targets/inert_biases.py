"""Biases that cannot change what a model computes: those of the keys under softmax.

A query q scores a key x as q·(W x + b). The term q·b is the same for every key, and softmax takes no notice of what is
added to all scores of a query. So b has no gradient, and training its delta would spend a part of the budget on
nothing. This holds for a key projection of its own, whose keys are neither rotated by their positions nor normalised,
and meet nothing but queries before softmax. No keys without the bias may stand beside them, such as those of MVP's
prompts. A term that does not contain the keys may be added to the scores: a mask, relative positions as in Swin.

A table names the attention classes of which this is known. What is not in it is trained: of an entry too few a little
of the budget is wasted, of an entry too many something would be lost silently.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn

from peft_fps.base.compiled import unwrapped


KEY_PROJECTIONS: dict[str, dict[str, frozenset[str]]] = {
    "transformers": {
        "k_proj": frozenset(
            {
                *("ASTAttention", "AltCLIPAttention", "BartAttention", "BioGptAttention"),
                *("BlenderbotAttention", "BlenderbotSmallAttention", "CLIPAttention"),
                *("CLIPSegAttention", "ChineseCLIPVisionAttention", "Data2VecAudioAttention"),
                *("DeiTAttention", "DetrCrossAttention", "DetrSelfAttention", "Dinov2Attention"),
                *("Dinov2WithRegistersAttention", "GitVisionAttention", "GroupViTAttention"),
                *("HubertAttention", "IJepaAttention", "Idefics3VisionAttention"),
                *("M2M100Attention", "MBartAttention", "MarianAttention"),
                *("OPTAttention", "OwlViTAttention", "Owlv2Attention", "PLBartAttention"),
                *("PegasusAttention", "SEWAttention", "SegformerAttention", "Siglip2Attention"),
                *("SiglipAttention", "SmolVLMVisionAttention", "SwinAttention"),
                *("TableTransformerAttention", "UniSpeechAttention", "UniSpeechSatAttention"),
                *("ViTAttention", "ViTMAEAttention", "ViTMSNAttention", "VivitAttention"),
                *("Wav2Vec2Attention", "WavLMAttention"),
            }
        ),
        "key": frozenset(
            {
                *("AlbertAttention", "AltRobertaSelfAttention", "BertCrossAttention"),
                *("BertGenerationSelfAttention", "BertSelfAttention", "BlipTextSelfAttention"),
                *("CamembertSelfAttention", "ChineseCLIPTextSelfAttention"),
                *("ConvBertSelfAttention", "DPTSelfAttention", "Data2VecTextSelfAttention"),
                *("DonutSwinSelfAttention", "ElectraSelfAttention", "ErnieSelfAttention"),
                *("EsmSelfAttention", "GLPNEfficientSelfAttention", "GitSelfAttention"),
                *("LayoutLMSelfAttention", "LiltSelfAttention", "MarkupLMSelfAttention"),
                *("MegatronBertSelfAttention", "MobileBertSelfAttention"),
                *("PvtEfficientSelfAttention", "PvtV2SelfAttention", "RemBertSelfAttention"),
                *("RobertaCrossAttention", "RobertaPreLayerNormSelfAttention"),
                *("RobertaSelfAttention", "SplinterSelfAttention", "SqueezeBertSelfAttention"),
                *("TapasSelfAttention", "ViltSelfAttention", "VisualBertSelfAttention"),
                *("XLMRobertaCrossAttention", "XLMRobertaSelfAttention"),
                *("XLMRobertaXLSelfAttention", "YolosSelfAttention"),
            }
        ),
        "layout_key": frozenset({"LiltSelfAttention"}),
        "k_lin": frozenset({"DistilBertSelfAttention", "MultiHeadAttention"}),
        "k": frozenset({"MPNetSelfAttention"}),
        "Wk": frozenset({"MultiHeadAttention"}),
    },
    "timm": {"k": frozenset({"AttentionPool2d", "ClassAttn"}), "wk": frozenset({"CrossAttention"})},
}
"""Classes of attention in which the bias of a key projection is inert, by library and name of the projection."""

SOFTMAX = frozenset({"eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4"})
"""Implementations of attention of transformers. What is registered besides may compute anything."""


def has_inert_bias(model: nn.Module, path: str) -> bool:
    """Return whether the bias of a module is inert: it changes no output of the module around it.

    Args:
        model: base model, with or without adapters.
        path: of the module in the base model.
    """
    owner, _, name = path.rpartition(".")
    attention: Any = unwrapped(model.get_submodule(owner))
    kind = type(attention)
    known = KEY_PROJECTIONS.get(kind.__module__.partition(".")[0], {})
    if kind.__name__ not in known.get(name, ()):
        return False
    # accelerate's hooks call the forward that they replace; any other one put over the class's may compute anything
    if "forward" in vars(attention) and not hasattr(attention, "_old_forward"):
        return False
    implementation = getattr(getattr(attention, "config", None), "_attn_implementation", None)
    softmax = implementation is None or implementation in SOFTMAX
    return softmax and getattr(attention, "position_embedding_type", "absolute") == "absolute"


def inert_biases(model: nn.Module, names: Iterable[str]) -> frozenset[str]:
    """Return those of the named modules of a base model, each with a bias, whose bias is inert."""
    return frozenset(name for name in names if has_inert_bias(model, name))
