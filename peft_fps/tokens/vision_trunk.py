"""The part of a vision transformer in which tokens can be selected, and why a model has none."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from peft_fps.base.compiled import plain_name, unwrapped
from peft_fps.layers.lookup import base_model
from peft_fps.tokens.selecting_blocks import (
    Dinov2SelectingBlock,
    ScoringAttention,
    SelectingBlock,
    Switched,
    TimmScoringAttention,
    TimmSelectingBlock,
    ViTSelectingBlock,
    plain_class,
)
from peft_fps.tokens.token_guards import MaplessTransformer, UnmaskedEmbeddings


@dataclass(frozen=True)
class Architecture:
    """How a class of vision transformers is built.

    Attributes:
        blocks: path of its list of blocks.
        protected: from the transformer to the number of tokens before the patches.
        block: by name of the class of its blocks, what such a block becomes.
        attention: by name of the class of their attention, what that becomes.
        guarded: path of the part that needs every patch in some calls; "" for the transformer itself.
        guard: what that part becomes, to refuse these.
    """

    blocks: str
    protected: Callable[[Any], int]
    block: dict[str, type[SelectingBlock]]
    attention: dict[str, type[Switched]]
    guarded: str = "embeddings"
    guard: type[Switched] = UnmaskedEmbeddings


def _of_transformers(
    name: str, prefix: str, blocks: str, kind: type[SelectingBlock], protected: Callable[[Any], int]
) -> tuple[str, Architecture]:
    """Return an item of `ARCHITECTURES` for a model family of transformers.

    Args:
        name: name of the family, as in `transformers.models`.
        prefix: how the names of its classes begin.
        blocks: path of the list of blocks.
        kind: what a block becomes.
        protected: from the transformer to the number of tokens before the patches.
    """
    place = f"transformers.models.{name}.modeling_{name}.{prefix}"
    architecture = Architecture(blocks, protected, {f"{place}Layer": kind}, {f"{place}Attention": ScoringAttention})
    return f"{place}Model", architecture


TIMM = Architecture(
    "blocks",
    lambda trunk: int(trunk.num_prefix_tokens),
    {"timm.models.vision_transformer.Block": TimmSelectingBlock},
    dict.fromkeys(
        ("timm.layers.attention.Attention", "timm.models.vision_transformer.Attention"), TimmScoringAttention
    ),
    guarded="",
    guard=MaplessTransformer,
)

ARCHITECTURES = dict(
    [
        _of_transformers("vit", "ViT", "layers", ViTSelectingBlock, lambda trunk: 1),
        _of_transformers("deit", "DeiT", "layers", ViTSelectingBlock, lambda trunk: 2),
        _of_transformers("dinov2", "Dinov2", "encoder.layer", Dinov2SelectingBlock, lambda trunk: 1),
        _of_transformers(
            "dinov2_with_registers",
            "Dinov2WithRegisters",
            "encoder.layer",
            Dinov2SelectingBlock,
            lambda trunk: 1 + int(trunk.config.num_register_tokens),
        ),
        ("timm.models.vision_transformer.VisionTransformer", TIMM),
        ("timm.models.deit.VisionTransformerDistilled", TIMM),
    ]
)
"""How each supported vision transformer is built, by the full name of its class."""

OF_CLS = (
    *("ViTForImageClassification", "DeiTForImageClassification", "DeiTForImageClassificationWithTeacher"),
    *("TimmWrapperForImageClassification", "TimmWrapperModel"),
)
"""Classes of transformers around a transformer that read its CLS and distillation tokens alone."""

SUPPORTED = (
    "transformers' ViT and DeiT with their classification heads, DINOv2's models without theirs (which pools "
    "patches), and timm's VisionTransformer with global_pool='token'"
)
TOKENS_REMEDY = "Leave token_keep_rate at None for this model. Nothing was changed."


@dataclass(frozen=True)
class VisionTrunk:
    """A vision transformer whose blocks can select tokens.

    Attributes:
        blocks: its blocks by path in the base model, in order.
        protected: number of tokens before the patches.
        architecture: how it is built.
        guarded: path and module of the part that needs every patch in some calls.
    """

    blocks: dict[str, nn.Module]
    protected: int
    architecture: Architecture
    guarded: tuple[str, nn.Module]


def vision_trunk(model: nn.Module) -> VisionTrunk:
    """Return the vision transformer of a model, after a check that tokens can be selected in it.

    Args:
        model: a base model, or a `PeftModel` around it.

    Raises:
        ValueError: there is none, there are several, or its head or blocks cannot do with some of the patches.
    """
    root = base_model(model)
    named = [(plain_name(path), unwrapped(module)) for path, module in root.named_modules()]
    found = {path: module for path, module in named if class_name(module) in ARCHITECTURES}
    if len(found) != 1:
        what = f"{len(found)} vision transformers ({', '.join(found)})" if found else "no vision transformer of them"
        raise ValueError(
            f"token_keep_rate: {type(root).__name__} holds {what}, expected exactly one of {SUPPORTED}. "
            f"{TOKENS_REMEDY}"
        )
    [(place, trunk)] = found.items()
    _check_head(named, place, trunk)
    architecture = ARCHITECTURES[class_name(trunk)]
    within = f"{place}." if place else ""
    listed = trunk.get_submodule(architecture.blocks)
    blocks = {
        f"{within}{architecture.blocks}.{name}": unwrapped(block) for name, block in unwrapped(listed).named_children()
    }
    for path, block in blocks.items():
        _check_block(path, block, architecture)
    guarded = (f"{within}{architecture.guarded}".rstrip("."), trunk.get_submodule(architecture.guarded))
    return VisionTrunk(blocks, architecture.protected(trunk), architecture, guarded)


def class_name(module: nn.Module) -> str:
    """Return the full name of the class that a module has, or had before it got one that selects tokens."""
    cls = plain_class(module)
    return f"{cls.__module__}.{cls.__qualname__}"


def _check_head(named: list[tuple[str, nn.Module]], place: str, trunk: Any) -> None:
    """Raise ValueError if something around the transformer, or at its end, reads the patches."""
    for path, module in named:
        around = path != place and (not path or place.startswith(f"{path}."))
        foreign = isinstance(module, PreTrainedModel) and type(module).__module__.startswith("transformers.")
        if around and foreign and type(module).__name__ not in OF_CLS:
            raise ValueError(
                f"token_keep_rate: found a {type(module).__name__}, which may read every patch, expected a model that "
                f"reads the CLS token alone: {SUPPORTED}. {TOKENS_REMEDY}"
            )
    pool = getattr(trunk, "global_pool", "token")
    if pool != "token" or getattr(trunk, "cls_token", None) is None and hasattr(trunk, "global_pool"):
        raise ValueError(
            f"token_keep_rate: {place or type(trunk).__name__} has global_pool={pool!r}, which reads every patch, "
            f"expected global_pool='token'. {TOKENS_REMEDY}"
        )


def _check_block(path: str, block: Any, architecture: Architecture) -> None:
    """Raise ValueError unless a block is of the class whose forward is known, and runs it."""
    kind = architecture.block.get(class_name(block))
    attention = None if kind is None else getattr(block, kind.attention_name, None)
    if attention is None or class_name(attention) not in architecture.attention:
        found = class_name(block) if attention is None else class_name(attention)
        raise ValueError(
            f"{path}: found a {found}, expected {' or '.join((*architecture.block, *architecture.attention))}, in "
            f"which tokens can be selected. {TOKENS_REMEDY}"
        )
    for module in (block, attention):
        if "forward" in vars(module):
            raise ValueError(
                f"{path}: found a forward put over its own, as accelerate does to offload weights (device_map), "
                f"expected a {class_name(module)} as it is. Load the model on one device. {TOKENS_REMEDY}"
            )
    if isinstance(attention, Switched) or architecture.attention[class_name(attention)] is not ScoringAttention:
        return
    if not all(hasattr(attention, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")):
        raise ValueError(
            f"{path}: its attention has other projections than q_proj, k_proj, v_proj and o_proj, expected those of "
            f"current versions of transformers. {TOKENS_REMEDY}"
        )
