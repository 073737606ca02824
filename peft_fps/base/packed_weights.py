"""Weights in 4 bit that bitsandbytes packs for inference, which adapters cannot be trained on."""

from importlib import import_module
from typing import Any

from torch import nn


def keep_unpacked(model: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights on the CPU, and unpack those that it has packed.

    On CPUs with bfloat16 instructions bitsandbytes 0.50 packs a weight for good in the first evaluation, calibration
    included. From then on its product passes no gradient on, without a word where the layer has no bias, and its
    stored numbers are no longer those that dequantising expects.

    Args:
        model: that gets an adapter.
    """
    for module in model.modules():
        if not getattr(module, "support_avx512bf16_for_cpu", False):
            continue
        layer: Any = module
        layer.support_avx512bf16_for_cpu = False
        state = getattr(layer.weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            functional = import_module("bitsandbytes.functional")
            layer.weight.data, layer.weight.quant_state = functional._convert_weight_packed_for_cpu_inverse(
                layer.weight.data, state
            )
            layer.quant_state = layer.weight.quant_state
