"""Which blocks select tokens: those that the user names, or those in which few of the best scores lie."""

from collections.abc import Mapping

from torch import nn

from peft_fps.config import FPSConfig
from peft_fps.importance import Score
from peft_fps.layers.entry_layer import EntryLayer
from peft_fps.selection import Candidate
from peft_fps.selection.blocks import best_shares
from peft_fps.tokens.token_placement import CHOSEN, eligible
from peft_fps.tokens.vision_trunk import vision_trunk


def chosen_token_blocks(
    model: nn.Module, config: FPSConfig, layers: Mapping[str, EntryLayer], scores: Mapping[str, Score]
) -> tuple[int, ...] | None:
    """Return the indices of the blocks that select tokens, in order; None if no tokens are selected.

    Without names these are the blocks that hold the smallest share of the best `block_top` of all scores, among those
    of `eligible`. The earlier block comes first where shares are equal. A block without a score has the share 0.

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
    return tuple(sorted(ranked[:CHOSEN]))
