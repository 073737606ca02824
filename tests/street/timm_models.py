"""Architectures of timm, at small image sizes and with few classes."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tests.street.lifecycle import Case
from tests.support.helpers import normal


def architecture(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        found: nn.Module = timm.create_model(name, num_classes=3, **options)
        return found

    return build


def standardised() -> nn.Module:
    """Of BiT's kind, small: its convolutions standardise their weights."""
    from timm.models.resnetv2 import ResNetV2

    found: nn.Module = ResNetV2(layers=(1, 1), channels=(128, 256), num_classes=3, stem_chs=32)
    return found


def mixer() -> nn.Module:
    from timm.models.mlp_mixer import MlpMixer

    found: nn.Module = MlpMixer(num_classes=3, img_size=32, patch_size=8, num_blocks=2, embed_dim=24)
    return found


def square(size: int) -> Callable[[], Tensor]:
    return lambda: normal(2, 3, size, size)


SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}

MODELS: dict[str, Case] = {
    "vit": Case(architecture("vit_tiny_patch16_224", **SMALL), square(32)),
    "deit-distilled": Case(architecture("deit_tiny_distilled_patch16_224", **SMALL), square(32)),
    "beit": Case(architecture("beit_base_patch16_224", **SMALL), square(32), idle=True),
    "eva02": Case(architecture("eva02_tiny_patch14_224", **SMALL), square(32), idle=True),
    "mixer": Case(mixer, square(32)),
    "swin": Case(
        architecture(
            "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=8, depths=(1, 1), num_heads=(2, 2)
        ),
        square(32),
    ),
    "resnet": Case(architecture("resnet10t"), square(32)),
    "resnet-bit": Case(standardised, square(32)),
    "nfnet": Case(architecture("test_nfnet"), square(32)),
    "efficientnet": Case(architecture("test_efficientnet"), square(32)),
    "mobilenet-v3": Case(architecture("mobilenetv3_small_050"), square(32)),
    "tf-mobilenet": Case(architecture("tf_mobilenetv3_small_minimal_100"), square(32)),
    "convnext": Case(architecture("test_convnext"), square(32)),
    "levit": Case(architecture("levit_128s", img_size=64), square(64)),
    "byobnet": Case(architecture("test_byobnet"), square(32)),
    "vit-test": Case(architecture("test_vit", img_size=32), square(32)),
}
