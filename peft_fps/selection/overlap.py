"""Agreement of two selections of the same modules, by the Jaccard index of TR-PTS (arXiv 2507.22872)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_fps.selection.blocks import block_of


@dataclass(frozen=True)
class Overlap:
    """Jaccard index |A ∩ B| / |A ∪ B| of the entries of two selections, from 0 to 1; `str()` gives a table.

    The index of two empty sets is 1. TR-PTS (arXiv 2507.22872) compares the selections of two tasks by it.

    Attributes:
        total: index of all entries.
        modules: index of each module's entries, by module path.
        blocks: index of the entries of each transformer block, by the path of the block. Modules outside any block,
            such as a patch embedding, do not count.
    """

    total: float
    modules: dict[str, float]
    blocks: dict[str, float]

    def __str__(self) -> str:
        parts = [{"module": "overlap"}]
        parts += [
            {name: f"{index:.4f}" for name, index in part.items()}
            for part in (self.modules, self.blocks, {"total": self.total})
        ]
        width = max(len(name) for part in parts for name in part)
        lines = [
            "\n".join(f"{name.ljust(width)}  {cell.rjust(len('overlap'))}" for name, cell in part.items())
            for part in parts
            if part
        ]
        return f"\n{'-' * (width + 2 + len('overlap'))}\n".join(lines)


def measure_overlap(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Overlap:
    """Compare two selections of the same modules.

    Args:
        first: positions of the entries in the flattened weight, by module path: `(nnz,)` int64, strictly increasing.
        second: positions of the other selection, by the same module paths. The numbers of entries may differ.
    """
    assert first.keys() == second.keys()
    common = {path: _common(positions, second[path]) for path, positions in first.items()}
    blocks: dict[str, list[str]] = {}
    for path in first:
        block = block_of(path)
        if block is not None:
            blocks.setdefault(block, []).append(path)

    def jaccard(paths: list[str]) -> float:
        both = sum(common[path] for path in paths)
        either = sum(first[path].numel() + second[path].numel() for path in paths) - both
        return both / either if either else 1.0

    return Overlap(
        total=jaccard(list(common)),
        modules={path: jaccard([path]) for path in common},
        blocks={block: jaccard(paths) for block, paths in blocks.items()},
    )


def _common(first: Tensor, second: Tensor) -> int:
    """Return the number of elements that two strictly increasing tensors share."""
    return int(torch.isin(first, second, assume_unique=True).sum())
