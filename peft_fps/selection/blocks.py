"""Numbers of entries per neuron that follow from where the largest scores lie (TR-PTS, arXiv 2507.22872)."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping
from fractions import Fraction
from typing import TypeVar

from peft_fps.selection.budget_allocation import LayerShape, exact
from peft_fps.selection.candidate import Candidate
from peft_fps.selection.model_wide import best_of_all


Block = TypeVar("Block", str, int)
"""A block by its path or index."""


def block_of(path: str) -> str | None:
    """Return the transformer block of a module: its path up to the first number, or None without a number.

    `"vit.layers.3.attention.q_proj"` is in the block `"vit.layers.3"`. A patch embedding is in no block.
    """
    parts = path.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    return None if first is None else ".".join(parts[: first + 1])


def block_entries(candidates: Mapping[str, Candidate], block_top: float) -> dict[str, int]:
    """Distribute the entries of all layers by the share of each block's weights among the best scores of the model.

    TR-PTS gives every neuron of layer l `C_l = max(1, w_l / min(w) * C_min)` entries, with w_l the layer's share in
    the best M of all scores. This function takes for w the part of a block's weights that are among these best scores.
    For blocks of one size, as in the paper, both rank blocks alike. `c = C_min / min(w)` follows from the total number
    of entries; see `entries_by_share`.

    Args:
        candidates: layers by module path. The function distributes the sum of their entries.
        block_top: M, a share of all scored weights, those outside any block included. At least one weight counts.

    Returns:
        Number of entries of each layer by module path.
    """
    total = sum(candidate.entries for candidate in candidates.values())
    if not total:
        return dict.fromkeys(candidates, 0)
    blocks = {name: block_of(name) for name in candidates}
    of_block = best_shares(candidates, block_top, blocks)
    shares = {name: Fraction(0) if block is None else of_block[block] for name, block in blocks.items()}
    return entries_by_share({name: candidate.shape for name, candidate in candidates.items()}, shares, total)


def best_shares(
    candidates: Mapping[str, Candidate], block_top: float, blocks: Mapping[str, Block | None]
) -> dict[Block, Fraction]:
    """Return the share of each block's weights that is among the best scores of the model.

    Args:
        candidates: layers by module path.
        block_top: share of all scored weights that are the best, those outside any block included. At least one.
        blocks: the block of each layer, by module path; None for a layer outside any.
    """
    weights, best = Counter[Block](), Counter[Block]()
    sizes = {name: candidate.shape.weights for name, candidate in candidates.items()}
    count = max(1, int(exact(block_top) * sum(sizes.values())))
    for name, positions in best_of_all(candidates, count):
        block = blocks[name]
        if block is not None:
            weights[block] += sizes[name]
            best[block] += positions.numel()
    return {block: Fraction(best[block], size) for block, size in weights.items()}


def entries_by_share(layers: Mapping[str, LayerShape], shares: Mapping[str, Fraction], total: int) -> dict[str, int]:
    """Give every neuron `K = max(1, c * share)` entries, at most its fan-in, with the c that yields the total.

    c is exact. A layer gets ⌊K * neurons⌋ entries. The rest goes to the layers with the largest fractions, one entry
    each, the earlier layer first where fractions are equal. So the sum equals the total. A share of 0 means K = 1, and
    more only if every weight of the other layers is selected.

    Args:
        layers: shapes by name.
        shares: not negative, by name.
        total: number of entries to distribute, between the number of all neurons and the number of all weights.

    Returns:
        Number of entries of each layer by name.
    """
    some = {name: layer for name, layer in layers.items() if shares[name]}
    none = {name: layer for name, layer in layers.items() if not shares[name]}
    k = _proportional(some, shares, total - sum(layer.neurons for layer in none.values()))
    left = total - sum(layer.neurons * k[name] for name, layer in some.items())
    k |= _proportional(none, dict.fromkeys(none, Fraction(1)), left)
    wanted = {name: layer.neurons * k[name] for name, layer in layers.items()}
    entries = {name: int(number) for name, number in wanted.items()}
    by_fraction = sorted(layers, key=lambda name: entries[name] - wanted[name])
    for name in by_fraction[: total - sum(entries.values())]:
        entries[name] += 1
    return entries


def _proportional(
    layers: Mapping[str, LayerShape], shares: Mapping[str, Fraction], available: Fraction | int
) -> dict[str, Fraction]:
    """Return `K = min(max(1, c * share), inputs)` of every layer.

    c is the largest number with `sum(neurons * K) <= available`.

    Args:
        layers: shapes by name.
        shares: positive, by name.
        available: number of entries of all layers together, at least the number of their neurons.
    """

    def per_neuron(c: Fraction) -> dict[str, Fraction]:
        return {n: min(max(Fraction(1), c * shares[n]), Fraction(layer.inputs)) for n, layer in layers.items()}

    def used(c: Fraction) -> Fraction:
        return sum((layers[name].neurons * k for name, k in per_neuron(c).items()), Fraction(0))

    # the sum is linear in c between two corners, so interpolation gives c exactly
    corners = sorted({bound / shares[name] for name, layer in layers.items() for bound in (1, layer.inputs)})
    if not corners:
        return {}
    c = corners[bisect_right(corners, available, key=used) - 1]
    growing = [name for name, layer in layers.items() if 1 <= c * shares[name] < layer.inputs]
    slope = sum((layers[name].neurons * shares[name] for name in growing), Fraction(0))
    return per_neuron(c + (available - used(c)) / slope if slope else c)
