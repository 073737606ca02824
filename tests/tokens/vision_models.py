"""Tiny vision transformers, and a naive forward of each that selects tokens image by image."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from tests.support.helpers import normal


timm = pytest.importorskip("timm", reason="timm is not installed; pip install timm", exc_type=ImportError)


RATE, BLOCKS = 0.55, (1, 3)
IMAGES = normal(3, 3, 16, 16)


class ClsHead(nn.Module):
    """A linear head on the CLS token of a model of transformers."""

    def __init__(self, trunk: Any) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(trunk.config.hidden_size, 3)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(self.trunk(pixel_values).pooler_output)


def sizes(**more: Any) -> dict[str, Any]:
    return {
        **{"hidden_size": 16, "num_hidden_layers": 5, "num_attention_heads": 2, "image_size": 16, "patch_size": 4},
        **more,
    }


def timm_vit(kind: str = "VisionTransformer", **more: Any) -> Any:
    cls = getattr(timm.models.deit if kind.endswith("Distilled") else timm.models.vision_transformer, kind)
    return cls(img_size=16, patch_size=4, embed_dim=16, depth=5, num_heads=2, num_classes=3, **more)


def vit(**more: Any) -> Any:
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**sizes(intermediate_size=24, num_labels=3, **more))
    )


MODELS: dict[str, Callable[[], Any]] = {
    "vit": vit,
    "deit": lambda: transformers.DeiTForImageClassificationWithTeacher(
        transformers.DeiTConfig(**sizes(intermediate_size=24, num_labels=3))
    ),
    "dinov2": lambda: ClsHead(transformers.Dinov2Model(transformers.Dinov2Config(**sizes(mlp_ratio=2)))),
    "registers": lambda: ClsHead(
        transformers.Dinov2WithRegistersModel(
            transformers.Dinov2WithRegistersConfig(**sizes(mlp_ratio=2, num_register_tokens=2))
        )
    ),
    "timm": lambda: timm_vit(reg_tokens=1, init_values=0.5, qk_norm=True),
    "timm distilled": lambda: timm_vit("VisionTransformerDistilled"),
}
PROTECTED = {"vit": 1, "deit": 2, "dinov2": 1, "registers": 3, "timm": 2, "timm distilled": 2}


def build(name: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = MODELS[name]()
        with torch.no_grad():  # small initial weights would make all attention equal
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def logits(output: Any) -> Tensor:
    found: Tensor = output if isinstance(output, Tensor) else output.logits
    return found


# --- the naive forward ----------------------------------------------------------------------------------------------


def naive_logits(name: str, model: Any, images: Tensor, rate: float = RATE, blocks: Any = BLOCKS) -> Tensor:
    """The logits of the plain model with tokens selected in some blocks, one image at a time."""
    return torch.cat([_one(name, model, image[None], rate, blocks) for image in images])


def _one(name: str, model: Any, image: Tensor, rate: float, blocks: Any) -> Tensor:
    if name.startswith("timm"):
        x = model._pos_embed(model.patch_embed(image))
        listed, norm = list(model.blocks), model.norm
    else:
        trunk = model.trunk if isinstance(model, ClsHead) else getattr(model, model.base_model_prefix)
        x = trunk.embeddings(image)
        listed = list(trunk.layers if hasattr(trunk, "layers") else trunk.encoder.layer)
        norm = trunk.layernorm
    for index, block in enumerate(listed):
        x = _block(x, block, PROTECTED[name], rate if index in blocks else 1.0)
    x = norm(x)
    if name.startswith("timm"):
        result: Tensor = model.forward_head(x)
    elif isinstance(model, ClsHead):
        result = model.head(x[:, 0])
    elif name == "deit":
        result = (model.cls_classifier(x[:, 0]) + model.distillation_classifier(x[:, 1])) / 2
    else:
        result = model.classifier(x[:, 0])
    return result


def _block(x: Tensor, block: Any, protected: int, rate: float) -> Tensor:
    first = block.norm1 if hasattr(block, "norm1") else block.layernorm_before
    second = block.norm2 if hasattr(block, "norm2") else block.layernorm_after
    attended, attention = _attention(first(x), block.attn if hasattr(block, "attn") else block.attention)
    x = x + _scaled(block, 1, attended)
    x = _select(x, attention, protected, rate) if rate < 1 else x
    return x + _scaled(block, 2, block.mlp(second(x)))


def _scaled(block: Any, which: int, x: Tensor) -> Tensor:
    layer = getattr(block, f"ls{which}", None) or getattr(block, f"layer_scale{which}", None)
    return x if layer is None else layer(x)


def _attention(x: Tensor, module: Any) -> tuple[Tensor, Tensor]:
    """The output of the attention, and its softmaxed rows `(heads, tokens, tokens)` in full."""
    if hasattr(module, "qkv"):
        query, key, value = module.qkv(x)[0].chunk(3, dim=-1)
        heads, norms, out = module.num_heads, (module.q_norm, module.k_norm), module.proj
    else:
        query, key, value = module.q_proj(x)[0], module.k_proj(x)[0], module.v_proj(x)[0]
        heads, norms, out = module.num_attention_heads, (nn.Identity(), nn.Identity()), module.o_proj
    rows, outputs = [], []
    for q, k, v in zip(query.chunk(heads, -1), key.chunk(heads, -1), value.chunk(heads, -1), strict=True):
        q, k = norms[0](q), norms[1](k)
        rows.append(torch.softmax(q @ k.T / q.shape[1] ** 0.5, dim=1))
        outputs.append(rows[-1] @ v)
    return out(torch.cat(outputs, dim=1))[None], torch.stack(rows)


def _select(x: Tensor, attention: Tensor, protected: int, rate: float) -> Tensor:
    """TR-PTS's formula for one image."""
    scores = attention[:, 0].mean(0)
    patches = list(range(protected, x.shape[1]))
    best = sorted(patches, key=lambda i: -scores[i].item())[: int(rate * len(patches))]
    rest = [i for i in patches if i not in best]
    numerator = sum((scores[i] * x[0, i] for i in rest), torch.zeros(x.shape[2]))
    denominator = sum((scores[i] for i in rest), torch.tensor(0.0))
    kept = [x[0, i] for i in (*range(protected), *sorted(best))]
    return torch.stack([*kept, numerator / denominator])[None]
