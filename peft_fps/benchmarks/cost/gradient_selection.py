"""Selection by gradients, as GPS does it, to compare with: a backward pass over all weights."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peft_fps.base.head import output_head
from peft_fps.benchmarks.cost.methods import PER_NEURON
from peft_fps.benchmarks.cost.random_models import copy_model
from peft_fps.gradients.contrastive import contrastive_step


@dataclass(frozen=True)
class Variant:
    """How the gradients come about.

    Attributes:
        label: its name in tables.
        contrastive: supervised contrastive loss on two views, else the model's own loss on one.
        eager: attention that keeps all its matrices, else the fused one.
    """

    label: str
    contrastive: bool
    eager: bool


VARIANTS = {
    "gps": Variant("GPS as its code does", contrastive=True, eager=True),
    "gps-sdpa": Variant("GPS with fused attention", contrastive=True, eager=False),
    "gps-one-view": Variant("GPS with the model's own loss, one view", contrastive=False, eager=False),
}


class GradientSelection:
    """Selects the weights with the largest accumulated gradients, the best few of each neuron.

    Ranks with `torch.topk`, where GPS's code sorts whole rows, which is slower.

    Args:
        base: the model, which is not changed.
        variant: how the gradients come about.
    """

    def __init__(self, base: PreTrainedModel, variant: Variant) -> None:
        self.variant = variant
        self.model = copy_model(base).requires_grad_(True).train()
        self.model.set_attn_implementation("eager" if variant.eager else "sdpa")

    def select(self, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return the selected columns of each layer, `(neurons, at most 6)`, by the layer's name."""
        heads = output_head(self.model)
        for batch in batches:
            if self.variant.contrastive:
                loss = contrastive_step(self.model, heads[0], batch, mirrored)
            else:
                loss = self.model(**batch).loss
            loss.backward()
        selected = {}
        for name, module in self.model.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)) and name not in heads and module.weight.grad is not None:
                scores = module.weight.grad.flatten(1).abs()
                selected[name] = scores.topk(min(PER_NEURON, scores.shape[1])).indices
        self.model.zero_grad()
        return selected


def mirrored(images: Tensor) -> Tensor:
    """Return two views of images, `(2 * batch, channels, height, width)`: the images themselves and mirrored.

    The second view of a real pipeline is another crop, whose cost is the data pipeline's.
    """
    return torch.cat([images, images.flip(-1)])
