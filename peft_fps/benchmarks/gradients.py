"""Selection by gradients, as GPS does it, to compare with: a backward pass over all weights."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from peft_fps.benchmarks.methods import PER_NEURON
from peft_fps.benchmarks.models import copy_model
from peft_fps.targets import output_head


TEMPERATURE = 0.07


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
        for batch in batches:
            loss = self._contrastive(batch) if self.variant.contrastive else self.model(**batch).loss
            loss.backward()
        heads = output_head(self.model)
        selected = {}
        for name, module in self.model.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)) and name not in heads and module.weight.grad is not None:
                scores = module.weight.grad.flatten(1).abs()
                selected[name] = scores.topk(min(PER_NEURON, scores.shape[1])).indices
        self.model.zero_grad()
        return selected

    def _contrastive(self, batch: Mapping[str, Tensor]) -> Tensor:
        images = batch["pixel_values"]
        # the second view of a real pipeline is another crop; its content costs nothing
        views = torch.cat([images, images.flip(-1)])
        return supervised_contrastive(self._features(views), batch["labels"].repeat(2))

    def _features(self, images: Tensor) -> Tensor:
        seen: list[Tensor] = []

        def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            seen.append(inputs[0])

        handle = self.model.get_submodule(output_head(self.model)[0]).register_forward_pre_hook(note)
        try:
            self.model(pixel_values=images)
        finally:
            handle.remove()
        return seen[0].flatten(1)


def supervised_contrastive(features: Tensor, labels: Tensor) -> Tensor:
    """Return the supervised contrastive loss (Khosla et al. 2020, eq. 2) at the temperature 0.07.

    Args:
        features: `(views, size)`, normalised here.
        labels: `(views,)`; every label occurs twice at least.
    """
    features = F.normalize(features, dim=1)
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    similar = (features @ features.t() / TEMPERATURE).masked_fill(itself, -torch.inf)
    positive = (labels[:, None] == labels) & ~itself
    log_shares = similar.log_softmax(1).masked_fill(~positive, 0.0)
    return -(log_shares.sum(1) / positive.sum(1)).mean()
