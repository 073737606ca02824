"""Models of torchvision, small ones."""

from collections.abc import Callable
from typing import Any

from torch import nn

from tests.street.lifecycle import Case
from tests.street.timm_models import square


def model(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchvision import models

        found: nn.Module = models.get_model(name, weights=None, num_classes=3, **options)
        return found

    return build


def residual_network() -> nn.Module:
    from torchvision.models.resnet import BasicBlock, ResNet

    found: nn.Module = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3)
    return found


def vision_transformer() -> nn.Module:
    from torchvision.models import VisionTransformer

    found: nn.Module = VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=24, mlp_dim=32, num_classes=3
    )
    return found


MODELS: dict[str, Case] = {
    "resnet": Case(residual_network, square(32)),
    "mobilenet-v3": Case(model("mobilenet_v3_small"), square(32)),
    "vit": Case(vision_transformer, square(32)),
    "squeezenet": Case(model("squeezenet1_1"), square(48)),
    "shufflenet": Case(model("shufflenet_v2_x0_5"), square(32)),
}
