"""PSCP, PEFT-Bench's one number for accuracy and costs (arXiv 2511.21285), with constants for vision transformers."""

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def soft_score(accuracy: float, trained: float, operations: float, memory: float) -> float:
    """Return P · (1 + M_p / C_p)⁻¹ · (1 + M_f / C_f)⁻¹ · (1 + M_m / C_m)⁻¹, PSCP with every β at 1.

    PEFT-Bench's constants are those of language models: 5 · 10⁸ parameters, 10 TFLOPs, 94 GB. Here they are what full
    fine-tuning of the same model takes, so each cost comes as a share of it. The order of methods depends on β.

    Args:
        accuracy: P.
        trained: M_p / C_p, trained parameters as a share of the backbone's.
        operations: M_f / C_f, operations of a forward pass of the adapted model beyond the base model's, as a share of
            the base model's. Negative where tokens are selected.
        memory: M_m / C_m, peak of a training step as a share of full fine-tuning's.
    """
    return accuracy / ((1 + trained) * (1 + operations) * (1 + memory))


def extra_operations(model: nn.Module, batch: Mapping[str, Any]) -> float:
    """Return the operations of a forward pass beyond the base model's, as a share of the base model's.

    An adapter is merged for it, unless it has gates. Operations are those that PyTorch's counter knows, products
    above all.

    Args:
        model: a `PeftModel`, which is not changed, or another model, which has no operations beyond its own.
        batch: arguments of the model.
    """
    if not isinstance(model, PeftModel):
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
