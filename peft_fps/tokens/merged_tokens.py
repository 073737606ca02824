"""Token selection of a model without adapters: what merging leaves, and what a saved merged model says of it."""

import warnings
from collections.abc import Mapping, Sequence
from functools import wraps
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from peft_fps.checkpoint.field_checks import check_indices, check_number
from peft_fps.layers.adapter_state import AdapterState
from peft_fps.layers.lookup import base_model, fps_layers
from peft_fps.tokens.token_placement import fix_token_selection, remove_token_selection, selecting_blocks
from peft_fps.tokens.vision_trunk import ARCHITECTURES, class_name


KEY = "fps_token_keep_rates"
"""Key in a merged model's config: keep rates by the index of the block, as a string."""


def select_tokens(model: nn.Module, keep_rate: float, blocks: Sequence[int]) -> None:
    """Let blocks of a plain model select tokens, as `FPSConfig(token_keep_rate=..., token_blocks=...)` does.

        model.load_state_dict(merged)  # of timm, say, whose files hold no config
        peft_fps.select_tokens(model, 0.7, [3, 6, 9])

    A model of transformers notes it in its config, and has it again when it is saved and loaded.

    Args:
        model: a vision transformer without adapters, such as a merged one.
        keep_rate: share of the patches that stay, above 0 and at most 1.
        blocks: indices of the blocks, from 0.

    Raises:
        TypeError, ValueError: the share or an index is invalid, or tokens cannot be selected in this model. Nothing is
            changed then.
    """
    _check_rate(keep_rate)
    check_indices("blocks", list(blocks))
    fix_token_selection(model, dict.fromkeys(blocks, float(keep_rate)))
    _note(base_model(model), dict.fromkeys(blocks, float(keep_rate)))


def set_token_keep_rate(model: nn.Module, keep_rate: float, adapter_name: str | None = None) -> None:
    """Let another share of the patches stay in the blocks that select tokens; 1.0 keeps all of them.

    It holds until it is set again, and is not saved, so that one can measure what the selection costs or saves.

    Args:
        model: a model with an adapter that selects tokens, or a merged one.
        keep_rate: the share, above 0 and at most 1.
        adapter_name: of the adapter. Default: those of the active adapters that select tokens, and a merged model's
            own selection, also below new adapters.

    Raises:
        TypeError, ValueError: the share is invalid, or nothing selects tokens. Nothing is changed then.
    """
    _check_rate(keep_rate)
    layers = fps_layers(model).values()
    states: dict[str, AdapterState] = {}
    for layer in layers:
        names = layer.merged_adapters or layer.active_adapters if adapter_name is None else [adapter_name]
        states |= {name: layer.fps_state[name] for name in names if name in layer.fps_state}
    selecting = [state for state in states.values() if state.token_keep_rate is not None]
    fixed = _fixed_switches(model) if adapter_name is None else []
    if not selecting and not fixed:
        raise ValueError(
            f"Found {adapter_name or 'the active adapters'!r} without token selection, expected an adapter made with "
            "FPSConfig(token_keep_rate=...)."
            if layers or adapter_name is not None
            else f"{type(model).__name__} selects no tokens, expected a model merged from an adapter that does, or "
            "blocks chosen with peft_fps.select_tokens."
        )
    for state in selecting:
        state.token_keep_rate = float(keep_rate)
    for switch in fixed:
        switch.fixed = float(keep_rate)


def settle_token_selection(model: nn.Module, merged: bool) -> None:
    """Let a model that is about to lose its adapters select tokens as the merged ones did, and warn of it.

    Args:
        model: a base model with adapters.
        merged: whether the adapters that are merged now stay in the model. Else it is what it was without them.
    """
    blocks = selecting_blocks(model)
    if not blocks:
        return
    switches = {index: block.token_switch for index, block in blocks.items()}
    before = {index: switch.fixed for index, switch in switches.items() if switch.fixed is not None}
    rates = {index: switch.merged_rate() for index, switch in switches.items()}
    rates = {index: rate for index, rate in rates.items() if rate < 1} if merged else before
    fix_token_selection(model, rates, with_adapters=False)
    if rates == before:
        return
    noted = _note(base_model(model), rates)
    if not rates:
        return
    kept = ", ".join(f"{rate:g} in block {index}" for index, rate in rates.items())
    remedy = (
        "Its config says so: import peft_fps before the saved model is loaded"
        if noted
        else "Its file will not say so: call peft_fps.select_tokens on the loaded model"
    )
    warnings.warn(
        f"The merged model goes on selecting tokens (share of patches that stay: {kept}). {remedy}, else it runs on "
        "all tokens, which it was not trained on.",
        stacklevel=4,
    )


def _fixed_switches(model: nn.Module) -> list[Any]:
    """Return the switches of a model that selects tokens whatever its adapters are."""
    switches: list[Any] = [module.token_switch for module in model.modules() if "token_switch" in vars(module)]
    return [switch for switch in switches if switch.fixed is not None]


def _check_rate(keep_rate: Any) -> None:
    """Raise TypeError or ValueError unless a keep rate is a number above 0 and at most 1."""
    check_number("keep_rate", keep_rate, upper=1.0, optional=False)
    if keep_rate == 0:
        raise ValueError("keep_rate is 0, expected a share of the patches above 0 and at most 1.")


def _note(model: Any, rates: Mapping[int, float]) -> bool:
    """Write keep rates by block into the config of a model of transformers. Return whether it is one."""
    if not isinstance(model, PreTrainedModel):
        return False
    setattr(model.config, KEY, {str(index): rate for index, rate in rates.items()})
    return True


def apply_noted_selection(model: Any) -> None:
    """Let a model select tokens as its config says, if it says so. Warn if it cannot."""
    noted = getattr(getattr(model, "config", None), KEY, None)
    if noted is None or not any(class_name(module) in ARCHITECTURES for module in model.modules()):
        return
    try:
        rates = {int(index): rate for index, rate in noted.items()}
        for rate in rates.values():
            _check_rate(rate)
        fix_token_selection(model, rates)
    except (AttributeError, TypeError, ValueError) as error:
        remove_token_selection(model)  # which a part of the model may have got already
        warnings.warn(
            f"{KEY} in the config is not applied, so the model runs on all tokens, which it was not "
            f"trained on: {error}",
            stacklevel=2,
        )


def watch_new_models() -> None:
    """Let models of transformers that are built from now on select tokens where their config says so.

    transformers calls `post_init` at the end of every model's constructor. A second call of this function does
    nothing.
    """
    if hasattr(PreTrainedModel.post_init, "selects_tokens"):
        return
    original = PreTrainedModel.post_init

    @wraps(original)
    def post_init(self: Any) -> None:
        original(self)
        apply_noted_selection(self)

    post_init.selects_tokens = True  # type: ignore[attr-defined]
    PreTrainedModel.post_init = post_init  # type: ignore[method-assign]
