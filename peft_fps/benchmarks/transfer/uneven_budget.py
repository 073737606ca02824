"""Unequal numbers of entries per neuron, from scores (OWL) or from the spectra of weights (AlphaPruning)."""

from collections.abc import Iterable, Mapping
from fractions import Fraction

import torch
from torch import Tensor

from peft_fps.selection.blocks import block_of
from peft_fps.selection.budget_allocation import LayerShape


OUTLIER = 5.0
"""M: a score above so many times the mean of its block is an outlier (OWL, arXiv 2310.05175)."""
SPREAD = 0.3
"""ε: the heaviest tail gets 1 + ε times the middle, the lightest 1 - ε times (AlphaPruning, arXiv 2410.10912)."""


def outlier_share(scores: Iterable[Tensor]) -> float:
    """Return the share of a block's scores that are above `OUTLIER` times their mean.

    Args:
        scores: of the block's matrices, each of any shape, not negative.
    """
    together = torch.cat([of_matrix.reshape(-1).double() for of_matrix in scores])
    return float((together > OUTLIER * together.mean()).double().mean())


def tail_exponent(weight: Tensor) -> float:
    """Return α of a power law, fitted to the larger half of the eigenvalues of WᵀW by Hill's estimator.

    A small α is a heavy tail, which AlphaPruning takes as the sign of a matrix that is trained well.

    Args:
        weight: `(neurons, inputs)`, with at least three rows and columns.
    """
    eigenvalues = torch.linalg.svdvals(weight.double()).square().flip(0)
    tail = eigenvalues[len(eigenvalues) // 2 :].log()
    return 1 + len(tail) / float((tail - tail[0]).sum())


def shares_by_outliers(weights: Mapping[str, Tensor], scores: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the `outlier_share` of each matrix's block, by path; a matrix outside any block is one of its own.

    OWL keeps more where outliers are many, within a band of sparsities that a fraction of a percent has no room for.
    Here the number of entries per neuron is in proportion to the share.

    Args:
        weights: not used.
        scores: of each matrix, by path.
    """
    blocks = {path: block_of(path) or path for path in scores}
    members: dict[str, list[Tensor]] = {}
    for path, block in blocks.items():
        members.setdefault(block, []).append(scores[path])
    found = {block: outlier_share(of_block) for block, of_block in members.items()}
    return {path: found[block] for path, block in blocks.items()}


def shares_by_tails(weights: Mapping[str, Tensor], scores: Mapping[str, Tensor]) -> dict[str, float]:
    """Return numbers from 1 - ε for the largest `tail_exponent` to 1 + ε for the smallest, linear between, by path.

    AlphaPruning maps exponents so to shares that are pruned. Here they are shares that are trained.

    Args:
        weights: `(neurons, inputs)`, by path.
        scores: not used.
    """
    exponents = {path: tail_exponent(weight) for path, weight in weights.items()}
    least, most = min(exponents.values()), max(exponents.values())
    width = (most - least) or 1.0
    return {path: 1 + SPREAD * (1 - 2 * (exponent - least) / width) for path, exponent in exponents.items()}


def in_proportion(layers: Mapping[str, LayerShape], shares: Mapping[str, float], total: int) -> dict[str, int]:
    """Distribute entries so that a layer's number per neuron is in proportion to its share, at most its fan-in.

    Where only layers of share 0 are left to take entries, these share equally. Parts of entries go to the layers with
    the largest fractions, so that the sum is the total.

    Args:
        layers: shapes by name.
        shares: not negative, by name.
        total: number of entries, at most the number of all weights.

    Returns:
        Number of entries of each layer by name.
    """
    wanted: dict[str, Fraction] = {}
    left, rest = dict(layers), Fraction(total)
    while left:
        some = any(shares[name] for name in left)
        part = {name: Fraction(shares[name]) if some else Fraction(1) for name in left}
        factor = rest / sum(layer.neurons * part[name] for name, layer in left.items())
        full = [name for name, layer in left.items() if factor * part[name] >= layer.inputs]
        for name in full or list(left):
            layer = left.pop(name)
            wanted[name] = layer.neurons * min(factor * part[name], Fraction(layer.inputs))
            rest -= wanted[name]
    entries = {name: int(wanted[name]) for name in layers}
    by_fraction = sorted(layers, key=lambda name: entries[name] - wanted[name])
    for name in by_fraction[: total - sum(entries.values())]:
        entries[name] += 1
    return entries
