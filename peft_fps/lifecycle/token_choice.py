"""Which blocks select tokens: those that the user names, or those in which few of the best scores lie."""

from collections.abc import Mapping

from torch import nn

from peft_fps.checkpoint.record import CONFIG_REMEDY
from peft_fps.config import FPSConfig
from peft_fps.importance import Score
from peft_fps.layers.entry_layer import EntryLayer
from peft_fps.selection import Candidate
from peft_fps.selection.blocks import best_shares
from peft_fps.tokens.token_placement import NUM_BLOCKS, check_token_selection, eligible
from peft_fps.tokens.vision_trunk import vision_trunk


def check_token_choice(model: nn.Module, config: FPSConfig) -> None:
    """Raise ValueError if the config asks for token selection and the model cannot do with some of its patches."""
    if config.token_keep_rate is None:
        return
    blocks = given_token_blocks(config)
    if blocks is None and config.record is not None:
        raise ValueError(
            f"record.selecting_blocks is None beside token_keep_rate={config.token_keep_rate}, expected the indices "
            f"of the blocks that select tokens. {CONFIG_REMEDY}"
        )
    check_token_selection(model, blocks)


def given_token_blocks(config: FPSConfig) -> tuple[int, ...] | None:
    """Return the blocks that select tokens, as the record or else the user says; None if a choice is still to come."""
    if config.record is not None:
        return config.record.selecting_blocks
    return None if config.token_blocks is None else tuple(config.token_blocks)


def chosen_token_blocks(
    model: nn.Module, config: FPSConfig, layers: Mapping[str, EntryLayer], scores: Mapping[str, Score]
) -> tuple[int, ...] | None:
    """Return the indices of the blocks that select tokens, in order; None if no tokens are selected.

    If the config names none, these are the `NUM_BLOCKS` blocks among those of `eligible` that hold the smallest share
    of the best `block_top` of all scores. The earlier block comes first where shares are equal. A block without a
    score has the share 0.

    Args:
        model: has the adapter.
        config: of the adapter.
        layers: its layers with entries, by module path.
        scores: of these layers, by path. Layers without a score do not count.
    """
    if config.token_keep_rate is None:
        return None
    if config.token_blocks is not None:
        return tuple(config.token_blocks)
    paths = {f"{path}.": index for index, path in enumerate(vision_trunk(model).blocks)}
    candidates = {path: Candidate(layers[path].shape, 0, score) for path, score in scores.items()}
    places = {path: next((i for start, i in paths.items() if path.startswith(start)), None) for path in candidates}
    shares = best_shares(candidates, config.block_top, places)
    ranked = sorted(eligible(len(paths)), key=lambda index: (shares.get(index, 0), index))
    return tuple(sorted(ranked[:NUM_BLOCKS]))
