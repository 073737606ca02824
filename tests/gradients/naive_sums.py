"""Models with labelled data, and plain training loops: one sums gradients and never steps, one fine-tunes."""

import copy
import weakref
from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
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


def padded_batches(count: int = 3) -> list[dict[str, Tensor]]:
    found = []
    for i in range(count):
        mask = torch.ones(4, 9, dtype=torch.int64)
        mask[0, 3 + i :], mask[2, 7:] = 0, 0
        found.append({"input_ids": tokens(seed=i), "attention_mask": mask})
    return found


def texts(labels: str, count: int = 3) -> list[dict[str, Tensor]]:
    """Padded texts with a class each, or with their tokens as labels, padding left out."""
    found = padded_batches(count)
    for i, batch in enumerate(found):
        ids, mask = batch["input_ids"], batch["attention_mask"]
        batch["labels"] = ids.masked_fill(mask == 0, -100) if labels == "tokens" else torch.arange(i, i + 4) % 3
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


def loss_in_bfloat16(model: nn.Module, batch: Any) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return plain_loss(model, batch)


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


def naive_movement(base: nn.Module, trained: Collection[str], batches: list[Any], rate: float) -> dict[str, Tensor]:
    """|w_T - w_0| of a full fine-tuning of the named parameters of a copy, as everyone would write it."""
    plain = copy.deepcopy(base).train()
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(name in trained)
    optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    for batch in batches:
        optimizer.zero_grad()
        plain_loss(plain, batch).backward()
        optimizer.step()
    before = dict(base.named_parameters())
    return {n: (p - before[n]).abs().detach() for n, p in plain.named_parameters() if p.requires_grad}


def with_dropout(model: nn.Module, share: float) -> Any:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = share
    return model


def as_double(batches: Any) -> Any:
    """The same with numbers in float64; integers stay."""
    return tree_map_only(Tensor, lambda part: part.double() if part.is_floating_point() else part, batches)


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


def gradients_alive_in_steps(
    patch: pytest.MonkeyPatch, kind: Any, model: nn.Module
) -> tuple[list[int], list[weakref.ref[Tensor]]]:
    """How many gradients live before each step of a `kind` that its own is handed to, and those that were handed."""
    alive: list[int] = []
    given: list[weakref.ref[Tensor]] = []
    step = kind.step

    def watched(trained: Any, gradient: Tensor) -> None:
        held = sum(parameter.grad is not None for parameter in model.parameters())
        alive.append(held + sum(reference() is not None for reference in given))
        given.append(weakref.ref(gradient))
        step(trained, gradient)

    patch.setattr(kind, "step", watched)
    return alive, given
