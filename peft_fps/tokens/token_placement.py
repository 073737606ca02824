"""Blocks that select tokens are put into a model, and taken out of it, as its adapters ask for."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from peft_fps.layers.fps_layer import FPSLayer
from peft_fps.tokens.selecting_blocks import SelectingBlock, Switched, switch_class
from peft_fps.tokens.token_switch import TokenSwitch
from peft_fps.tokens.vision_trunk import VisionTrunk, class_name, vision_trunk


NUM_BLOCKS = 3
"""Number of blocks that select tokens where the user names none, as in TR-PTS's tree."""


def place_token_selection(model: nn.Module) -> None:
    """Let the blocks that the model's adapters name select tokens, and all others compute as their class does.

    A model whose adapters select no tokens, and never have, is left alone. The adapters are those that its layers
    have at the moment, so this is called whenever one has come, gone, or got other blocks.

    Args:
        model: a base model, or a `PeftModel` around it.

    Raises:
        ValueError: tokens cannot be selected in this model. `check_token_selection` says so before.
    """
    guides = _guides(model)
    present = [module for module in model.modules() if isinstance(module, Switched)]
    if not guides and not present:
        return
    trunk = vision_trunk(model)
    for index, (path, block) in enumerate(trunk.blocks.items()):
        wanted = {name: layer for name, layer in guides.items() if index in _blocks(layer, name)}
        _place(path, block, trunk, TokenSwitch(path, trunk.protected, fixed_rate(block), wanted))
    _place_guard(trunk, guides)


def fix_token_selection(model: nn.Module, rates: dict[int, float], *, with_adapters: bool = True) -> None:
    """Let blocks of a model select tokens whatever its adapters are. Nothing changes where an error is raised.

    Args:
        model: a base model, or a `PeftModel` around it.
        rates: by index of the block, the share of the patches that it keeps. Other blocks have no such share after it.
        with_adapters: let blocks go on following the adapters too. False for a model that is about to lose them.

    Raises:
        ValueError: there is no such block, or tokens cannot be selected in this model.
    """
    trunk, guides = vision_trunk(model), _guides(model) if with_adapters else {}
    check_blocks(trunk, list(rates))
    for index, (path, block) in enumerate(trunk.blocks.items()):
        wanted = {name: layer for name, layer in guides.items() if index in _blocks(layer, name)}
        _place(path, block, trunk, TokenSwitch(path, trunk.protected, rates.get(index), wanted))
    _place_guard(trunk, guides)


def remove_token_selection(model: nn.Module) -> None:
    """Let all modules of a model compute as their own classes do."""
    for module in model.modules():
        if isinstance(module, Switched):
            switch_class(module, None, None)


def check_token_selection(model: nn.Module, blocks: Sequence[int] | None) -> None:
    """Check that tokens can be selected in a model.

    Args:
        model: a base model, or a `PeftModel` around it.
        blocks: indices of the blocks that are to do it; None if they are chosen later.

    Raises:
        ValueError: they cannot, or there is no such block.
    """
    trunk = vision_trunk(model)
    if blocks is not None:
        check_blocks(trunk, blocks)


def check_blocks(trunk: VisionTrunk, blocks: Sequence[int]) -> None:
    """Raise ValueError unless a vision transformer has blocks of these indices."""
    wrong = [index for index in blocks if not 0 <= index < len(trunk.blocks)]
    if wrong:
        raise ValueError(
            f"token_blocks names {wrong}, expected indices from 0 to {len(trunk.blocks) - 1}, since the model has "
            f"{len(trunk.blocks)} blocks. Nothing was changed."
        )


@contextmanager
def unmixed_tokens(model: nn.Module, adapter_names: Sequence[str]) -> Iterator[None]:
    """Let no adapter select tokens while a batch has adapters of its own, whichever are active in the model.

    What a merged model has selected since merging stays.

    Args:
        model: a base model with adapters.
        adapter_names: of the batch, one per sample.

    Raises:
        ValueError: one of the batch's adapters selects tokens, so that sequences would differ.
    """
    selecting = [name for name in _guides(model) if name in adapter_names]
    if selecting:
        raise ValueError(
            f"adapter_names holds {selecting}, which select tokens (token_keep_rate), expected adapters without, "
            "since the sequences of one batch have one length. Run their samples as batches of their own, with "
            "model.set_adapter(name)."
        )
    switches: list[Any] = [m.token_switch for m in model.modules() if "token_switch" in vars(m)]
    guides = [switch.guides for switch in switches]
    for switch in switches:
        switch.guides = {}
    try:
        yield
    finally:
        for switch, before in zip(switches, guides, strict=True):
            switch.guides = before


def eligible(blocks: int) -> range:
    """Return the indices among which blocks are chosen to select tokens, at least one.

    The first two are left out, since their CLS attention says little of the patches, and the last one, which saves
    little. A model of two or three blocks has the last but one alone.

    Args:
        blocks: number of blocks.
    """
    return range(max(0, min(2, blocks - 2)), max(1, blocks - 1))


def quarter_blocks(blocks: int) -> list[int]:
    """Return the blocks after a quarter, half and three quarters of all: 3, 6 and 9 of 12, as TR-PTS's code has it."""
    return sorted({blocks * quarter // 4 for quarter in (1, 2, 3)})


def fixed_rate(block: nn.Module) -> float | None:
    """Return the share of the patches that a block keeps whatever the adapters are; None if there is none."""
    return block.token_switch.fixed if isinstance(block, SelectingBlock) else None


def selecting_blocks(model: nn.Module) -> dict[int, SelectingBlock]:
    """Return the blocks of a model that may select tokens, by index."""
    if not any(isinstance(module, SelectingBlock) for module in model.modules()):
        return {}
    blocks = enumerate(vision_trunk(model).blocks.values())
    return {index: block for index, block in blocks if isinstance(block, SelectingBlock)}


def _guides(model: nn.Module) -> dict[str, FPSLayer]:
    """Return a layer of each adapter that selects tokens, by its name."""
    found: dict[str, FPSLayer] = {}
    for module in model.modules():
        if isinstance(module, FPSLayer):
            for name in module.fps_state:
                if name not in found and _blocks(module, name):
                    found[name] = module
    return found


def _blocks(layer: FPSLayer, adapter_name: str) -> tuple[int, ...]:
    """Return the indices of the blocks in which an adapter of the layer selects tokens; none if it selects none."""
    state = layer.fps_state[adapter_name]
    return () if state.token_keep_rate is None else state.token_blocks or ()


def _place(path: str, block: nn.Module, trunk: VisionTrunk, switch: TokenSwitch) -> None:
    """Put a switch into a block that is to select tokens, or give a block its own class back.

    Args:
        path: of the block in the base model.
        block: the block.
        trunk: vision transformer that has the block.
        switch: says whether the block is to select tokens, and how many.
    """
    kind = trunk.architecture.block[class_name(block)]
    attention = block.get_submodule(kind.attention_name)
    if switch.needed:
        switch_class(attention, trunk.architecture.attention[class_name(attention)], None)
        switch_class(block, kind, switch)
    elif isinstance(block, SelectingBlock):
        switch_class(attention, None, None)
        switch_class(block, None, None)


def _place_guard(trunk: VisionTrunk, guides: dict[str, FPSLayer]) -> None:
    """Let what needs every patch in some calls refuse these as long as some block selects tokens."""
    path, part = trunk.guarded
    rates = [rate for block in trunk.blocks.values() if (rate := fixed_rate(block)) is not None]
    switch = TokenSwitch(path, trunk.protected, min(rates, default=None), guides)
    if switch.needed:
        switch_class(part, trunk.architecture.guard, switch)
    elif isinstance(part, Switched):
        switch_class(part, None, None)
