"""Models with labelled data, and gradients summed by a plain training loop that never steps."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_fps.gradients import Weight
from peft_fps.sparse import Layout
from tests.support.helpers import (
    image_batches,
    normal,
    tiny_bert,
    tiny_codec,
    tiny_conv,
    tiny_gpt2,
    tiny_llama,
    tiny_mlp,
    tiny_vit,
    tokens,
)


ENABLING = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # renamed in transformers


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
KINDS = (nn.Linear, Conv1D, *CONVOLUTIONS, *TRANSPOSED)


BACKWARD = ["gradient", "fisher", "sensitivity"]


def labelled_images(count: int = 3, batch: int = 4, classes: int = 5) -> list[dict[str, Tensor]]:
    labels = torch.arange(count * batch).split(batch)
    return [
        one | {"labels": target % classes} for one, target in zip(image_batches(count, batch), labels, strict=True)
    ]


def pairs(shape: tuple[int, ...], classes: int, count: int = 3) -> list[tuple[Tensor, Tensor]]:
    return [(normal(*shape, seed=i), torch.arange(i, i + shape[0]) % classes) for i in range(count)]


def texts(labels: str, count: int = 3) -> list[dict[str, Tensor]]:
    """Padded texts with a class each, or with their tokens as labels, padding left out."""
    found = []
    for i in range(count):
        mask = torch.ones(4, 9, dtype=torch.int64)
        mask[0, 3 + i :], mask[2, 7:] = 0, 0
        ids = tokens(seed=i)
        target = ids.masked_fill(mask == 0, -100) if labels == "tokens" else torch.arange(i, i + 4) % 3
        found.append({"input_ids": ids, "attention_mask": mask, "labels": target})
    return found


Case = tuple[Callable[[], nn.Module], Callable[[], list[Any]], str]


CASES: dict[str, Case] = {
    # model, batches, and the head that is left out
    "vit": (tiny_vit, labelled_images, "classifier"),
    "gpt2": (tiny_gpt2, lambda: texts("tokens"), "lm_head"),
    "llama": (tiny_llama, lambda: texts("tokens"), "lm_head"),
    "bert": (tiny_bert, lambda: texts("classes"), "classifier"),
    "conv": (tiny_conv, lambda: pairs((4, 3, 16, 16), 5), "none"),
    "codec": (tiny_codec, lambda: pairs((4, 2, 8), 4), "none"),
    "mlp": (tiny_mlp, lambda: pairs((6, 10), 4), "none"),
}


def plain_loss(model: nn.Module, batch: Any) -> Tensor:
    return model(**batch).loss if isinstance(batch, dict) else F.cross_entropy(model(batch[0]), batch[1])


def examples_of(batch: Any) -> list[Any]:
    if isinstance(batch, dict):
        return [{key: value[i : i + 1] for key, value in batch.items()} for i in range(len(batch["labels"]))]
    return [tuple(part[i : i + 1] for part in batch) for i in range(len(batch[1]))]


def matrix(module: Any, tensor: Tensor) -> Tensor:
    """A tensor of a weight's shape as `(neurons, inputs)`."""
    if isinstance(module, TRANSPOSED):
        return torch.cat([part.transpose(0, 1).flatten(1) for part in tensor.chunk(module.groups)])
    return tensor.t() if isinstance(module, Conv1D) else tensor.flatten(1)


def naive_sums(base: nn.Module, batches: list[Any], head: str, square: bool = False, loss: Any = plain_loss) -> Any:
    """Sums of gradients, or of their squares, over `batches`, by module path, as GPS gathers them."""
    base = copy.deepcopy(base).requires_grad_(True)
    weighted = {name: m for name, m in base.named_modules() if isinstance(m, KINDS) and name != head}
    total = {name: torch.zeros(matrix(module, module.weight).shape) for name, module in weighted.items()}
    for batch in batches:
        base.zero_grad()
        loss(base, batch).backward()
        for name, module in weighted.items():
            gradient = matrix(module, module.weight.grad).float()
            total[name] += gradient.square() if square else gradient
    return total


def layout(module: Any) -> Layout:
    if isinstance(module, TRANSPOSED):
        return Layout(True, module.groups, module.weight.shape[2:].numel())
    return Layout(transposed=isinstance(module, Conv1D))


def weights_of(base: nn.Module, head: str = "none") -> dict[str, Weight]:
    return {
        name: Weight(module.weight, layout(module))
        for name, module in base.named_modules()
        if isinstance(module, KINDS) and name != head
    }
