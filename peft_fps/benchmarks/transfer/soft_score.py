"""PSCP, PEFT-Bench's one number for accuracy and costs (arXiv 2511.21285), with constants for vision transformers."""

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import mean
from typing import Any

import torch
from peft import PeftMixedModel, PeftModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class SoftScore:
    """What PSCP is made of.

    PEFT-Bench's constants are those of language models: 5 · 10⁸ parameters, 10 TFLOPs, 94 GB. Here they are what full
    fine-tuning of the same model takes, so each cost comes as a share of it.

    Attributes:
        accuracy: P.
        trained: M_p / C_p, trained parameters as a share of the backbone's.
        operations: M_f / C_f, operations of a forward pass of the adapted model beyond the base model's, as a share of
            the base model's. Negative where tokens are selected.
        memory: M_m / C_m, peak of a training step as a share of full fine-tuning's.
    """

    accuracy: float
    trained: float
    operations: float
    memory: float

    def value(self, beta_p: float = 1.0, beta_f: float = 1.0, beta_m: float = 1.0) -> float:
        """Return P (1 + M_p / C_p)^-β_p (1 + M_f / C_f)^-β_f (1 + M_m / C_m)^-β_m; every β is 1 in PEFT-Bench."""
        costs = (1 + self.trained) ** beta_p * (1 + self.operations) ** beta_f * (1 + self.memory) ** beta_m
        return self.accuracy / float(costs)


def reordered_pairs(scores: Sequence[SoftScore]) -> tuple[float, float, float]:
    """Return which share of the pairs changes places when β_p, β_f or β_m alone is halved or doubled.

    Args:
        scores: two at least.
    """
    pairs = list(combinations(scores, 2))

    def changed(name: str) -> float:
        return mean(
            any((a.value() > b.value()) != (a.value(**{name: beta}) > b.value(**{name: beta})) for beta in (0.5, 2.0))
            for a, b in pairs
        )

    return changed("beta_p"), changed("beta_f"), changed("beta_m")


def extra_operations(model: nn.Module, batch: Mapping[str, Any]) -> float:
    """Return the operations of a forward pass beyond the base model's, as a share of the base model's.

    An adapter is merged for it, unless it has gates. Operations are those that PyTorch's counter knows, products
    above all.

    Args:
        model: a `PeftModel` or `PeftMixedModel`, which is not changed, or another model, which has no operations
            beyond its own.
        batch: arguments of the model.
    """
    if not isinstance(model, PeftModel | PeftMixedModel):
        return 0.0
    plain = _operations(copy.deepcopy(model).unload(), batch)
    adapted: Any = copy.deepcopy(model)
    if not any(getattr(config, "token_gate", None) for config in model.peft_config.values()):
        with warnings.catch_warnings():  # nothing is saved here, so nothing is lost
            warnings.filterwarnings("ignore", "The merged model goes on selecting tokens")
            adapted = adapted.merge_and_unload()
    return _operations(adapted, batch) / plain - 1


@torch.no_grad()
def _operations(model: nn.Module, batch: Mapping[str, Any]) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        model.eval()(**batch)
    return counter.get_total_flops()
