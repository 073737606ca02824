"""Models in which tokens cannot be selected are refused before anything changes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from peft import get_peft_model
from torch import nn

from peft_fps import FPSConfig
from peft_fps.tokens.vision_trunk import vision_trunk
from tests.support.helpers import tiny_bert, unchanged
from tests.tokens.vision_models import MODELS, PROTECTED, build, sizes, timm, timm_vit, vit


SMALL = sizes(intermediate_size=24)


@pytest.mark.parametrize("name", MODELS)
def test_blocks_and_protected_tokens(name: str) -> None:
    trunk, model = vision_trunk(build(name)), build(name)
    assert trunk.protected == PROTECTED[name]
    assert len(trunk.blocks) == 5
    modules = dict(model.named_modules())
    assert [type(block) for block in trunk.blocks.values()] == [type(modules[path]) for path in trunk.blocks]


def with_forward_put_over() -> Any:
    model = vit()
    model.vit.layers[2].forward = model.vit.layers[2].forward
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "no vision": (tiny_bert, "BertForSequenceClassification holds no vision transformer"),
    "DINOv2's head": (
        lambda: transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**sizes(num_labels=3))),
        "found a Dinov2ForImageClassification, which may read every patch",
    ),
    "masked images": (
        lambda: transformers.ViTForMaskedImageModeling(transformers.ViTConfig(**SMALL, encoder_stride=4)),
        "found a ViTForMaskedImageModeling, which may read every patch",
    ),
    "relative positions": (
        lambda: transformers.BeitForImageClassification(transformers.BeitConfig(**SMALL)),
        "holds no vision transformer",
    ),
    "rotary positions": (
        lambda: transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**SMALL)),
        "holds no vision transformer",
    ),
    "windows": (
        lambda: timm.models.swin_transformer.SwinTransformer(
            img_size=32, patch_size=4, embed_dim=8, depths=(1, 1), num_heads=(2, 2), window_size=4, num_classes=2
        ),
        "holds no vision transformer",
    ),
    "two": (lambda: nn.ModuleList([vit(), vit()]), r"holds 2 vision transformers \(0.vit, 1.vit\)"),
    "pooled patches": (lambda: timm_vit(global_pool="avg"), "has global_pool='avg', which reads every patch"),
    "other blocks": (
        lambda: timm_vit(block_fn=timm.models.vision_transformer.ResPostBlock),
        "blocks.0: found a timm.models.vision_transformer.ResPostBlock, expected timm",
    ),
    "offloaded": (with_forward_put_over, "vit.layers.2: found a forward put over its own"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason_and_nothing_changed(name: str) -> None:
    make, message = REFUSED[name]
    model = make()
    classes = [type(module) for module in model.modules()]
    with unchanged(model), pytest.raises(ValueError, match=message):
        get_peft_model(model, FPSConfig(token_keep_rate=0.5, token_blocks=[1], target_modules="all-linear"))
    assert classes == [type(module) for module in model.modules()]


def test_blocks_that_a_model_lacks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"token_blocks names \[5\], expected indices from 0 to 4"):
        get_peft_model(vit(), FPSConfig(token_keep_rate=0.5, token_blocks=[1, 5]))


def test_a_model_with_a_cls_head_of_one_s_own_is_taken() -> None:
    model = get_peft_model(
        build("dinov2"), FPSConfig(importance="magnitude", token_keep_rate=0.5, token_blocks=[2], bias="none")
    )
    assert model(torch.zeros(1, 3, 16, 16)).shape == (1, 3)
