"""What a head is in timm and torchvision: what depends on the number of classes."""

from importlib import import_module
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

from peft_fps.base.head import find_head
from peft_fps.targets.base_parameters import count_base_parameters
from peft_fps.targets.default_targets import default_targets
from tests.support.helpers import adapted, config, layers_of, normal


def library(name: str) -> Any:
    try:
        return import_module(name)
    except (ImportError, RuntimeError) as error:  # a torchvision built for another torch
        pytest.skip(f"{name} cannot be imported here: {error}")


def on_meta(build: Any) -> Any:
    try:
        with torch.device("meta"):
            return build()
    except NotImplementedError:  # reads a value that it made
        return build()


def sized_by_classes(one: nn.Module, other: nn.Module) -> set[str]:
    pairs = zip(one.named_parameters(), other.named_parameters(), strict=True)
    return {name.rpartition(".")[0] for (name, parameter), (_, twin) in pairs if parameter.shape != twin.shape}


# --- timm -----------------------------------------------------------------------------------------------------------

TIMM = {
    "mixer_s32_224": ["head"],
    "resnet18": ["fc"],
    "vit_tiny_patch16_224": ["head"],
    "deit_tiny_distilled_patch16_224": ["head", "head_dist"],
    "convnext_atto": ["head.fc"],
    "efficientnet_b0": ["classifier"],
    "mobilenetv3_small_050": ["classifier"],
    "swin_tiny_patch4_window7_224": ["head.fc"],
    "eva02_tiny_patch14_224": ["head"],
    "coatnet_nano_rw_224": ["head.fc"],
    "nfnet_f0": ["head.fc"],
    "regnetx_002": ["head.fc"],
    "densenet121": ["classifier"],
    "vgg11": ["head.fc"],
    "cait_xxs24_224": ["head"],
    "xcit_nano_12_p16_224": ["head"],
    "beit_base_patch16_224": ["head"],
    "maxvit_nano_rw_256": ["head.fc"],
    "poolformer_s12": ["head.fc"],
    "ghostnet_050": ["classifier"],
    "volo_d1_224": ["aux_head", "head"],
    "convmixer_768_32": ["head"],  # convolutions alone
}


@pytest.mark.parametrize("name", TIMM)
def test_timm(name: str) -> None:
    timm = library("timm")
    model, other = (on_meta(lambda n=n: timm.create_model(name, num_classes=n)) for n in (3, 4))
    head = find_head(model)
    assert head.modules == TIMM[name]
    assert set(TIMM[name]) == sized_by_classes(model, other)
    assert not default_targets(model, config(), head) & set(TIMM[name])
    sizes = {key: p.numel() for key, p in model.named_parameters()}
    heads = tuple(f"{head}." for head in TIMM[name])
    assert count_base_parameters(model) == sum(n for key, n in sizes.items() if not key.startswith(heads))


@pytest.mark.parametrize("name", ["mixer_s32_224", "deit_tiny_distilled_patch16_224", "convnext_atto"])
def test_timm_without_classes_has_no_head(name: str) -> None:
    model = on_meta(lambda: library("timm").create_model(name, num_classes=0))
    assert find_head(model).modules == []


def tiny_mixer(classes: int = 3) -> Any:
    mixer = library("timm.models.mlp_mixer").MlpMixer
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return mixer(num_classes=classes, img_size=16, patch_size=8, num_blocks=2, embed_dim=16)


def test_a_mixer_learns() -> None:
    """Its head starts at zero, so that no gradient comes through as long as that stays as it is."""
    base, x = tiny_mixer(), normal(4, 3, 16, 16)
    assert not base.head.weight.any()
    model = adapted(base, filled=False).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    before = model(x).detach()
    changes = []
    for _ in range(2):
        nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2, 1])).backward()
        changes.append([layer.fps_values.default.grad.abs().max().item() for layer in layers_of(model).values()])
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(model(x), before)
    assert max(changes[0]) == 0 < min(changes[1])  # the head first, then everything


def test_a_timm_model_is_saved_with_its_head(tmp_path: Any) -> None:
    x = normal(4, 3, 16, 16)
    model = adapted(tiny_mixer())
    with torch.no_grad():
        model.base_model.model.head.weight.add_(normal(3, 16))
    expected = model(x)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(tiny_mixer(), tmp_path).eval()(x), expected)


def test_timm_within_transformers() -> None:
    library("timm")
    size = TimmWrapperConfig(architecture="resnet18", num_labels=3)
    model = on_meta(lambda: TimmWrapperForImageClassification(size))
    assert find_head(model).modules == ["timm_model.fc"]


# --- torchvision ----------------------------------------------------------------------------------------------------

TORCHVISION = {
    "resnet18": ["fc"],
    "alexnet": ["classifier.6"],
    "vgg11": ["classifier.6"],
    "squeezenet1_0": ["classifier.1"],
    "densenet121": ["classifier"],
    "googlenet": ["aux1.fc2", "aux2.fc2", "fc"],
    "shufflenet_v2_x0_5": ["fc"],
    "mobilenet_v3_small": ["classifier.3"],
    "mnasnet0_5": ["classifier.1"],
    "efficientnet_b0": ["classifier.1"],
    "regnet_y_400mf": ["fc"],
    "vit_b_16": ["heads"],
    "convnext_tiny": ["classifier.2"],
    "swin_t": ["head"],
    "maxvit_t": ["classifier.5"],
    "fcn_resnet50": ["classifier", "aux_classifier"],
    "lraspp_mobilenet_v3_large": ["classifier"],
    "fasterrcnn_mobilenet_v3_large_fpn": ["roi_heads.box_predictor"],
    "maskrcnn_resnet50_fpn": ["roi_heads.box_predictor", "roi_heads.mask_predictor"],
    "retinanet_resnet50_fpn": ["head"],
    "fcos_resnet50_fpn": ["head"],
}


@pytest.mark.parametrize("name", TORCHVISION)
@pytest.mark.filterwarnings("ignore:The default weight initialization of GoogleNet:FutureWarning")
def test_torchvision(name: str) -> None:
    """Detectors and segmentation count their heads whole, which hold more than depends on the number of classes."""
    models = library("torchvision.models")
    options: dict[str, Any] = {}
    if any(part in name for part in ("fcn_", "lraspp", "rcnn", "retinanet", "fcos")):
        options["weights_backbone"] = None
    if name == "fcn_resnet50":
        options["aux_loss"] = True
    model, other = (on_meta(lambda n=n: models.get_model(name, num_classes=n, **options)) for n in (3, 4))
    head = find_head(model)
    assert head.modules == TORCHVISION[name]
    heads = tuple(f"{head}." for head in TORCHVISION[name])
    assert all(f"{path}.".startswith(heads) for path in sized_by_classes(model, other))
    assert not any(f"{path}.".startswith(heads) for path in default_targets(model, config(), head))


# --- anything else --------------------------------------------------------------------------------------------------


def test_other_models_are_one_whole() -> None:
    assert find_head(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))) == type(find_head(nn.Identity()))()
