"""The inputs of weights that no layer is called for."""

from collections.abc import Mapping
from typing import Any

from peft_fps.base.attention import Projection
from peft_fps.base.packed_weight import PackedWeight
from peft_fps.calibration.attention_inputs import watch_attention
from peft_fps.calibration.expert_inputs import Receive, watch_stacked


def watch_packed(weights: Mapping[str, PackedWeight], receive: Receive) -> list[Any]:
    """Hand over the inputs of every matrix of weights in each call of the modules that own them.

    Args:
        weights: by path.
        receive: gets the inputs.

    Returns:
        Handles of hooks, to be removed.
    """
    attention = {path: weight for path, weight in weights.items() if isinstance(weight, Projection)}
    handles = watch_attention(attention, receive)
    return handles + watch_stacked({path: w for path, w in weights.items() if path not in attention}, receive)
