"""Where a module stands in a picture: transformer blocks from left to right, types of modules from top to bottom."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from peft_fps.selection.blocks import block_of


OUTSIDE = "none"
"""Label of the column of modules that belong to no block."""


@dataclass(frozen=True)
class Grid:
    """Modules by type and block.

    Attributes:
        types: of modules, from top to bottom: those outside any block first.
        blocks: from left to right; None, if there, is first and stands for modules outside any block.
        cells: the modules of a type in a block. Several, where a block holds a list: experts, stages of layers.
    """

    types: list[str]
    blocks: list[str | None]
    cells: Mapping[tuple[str, str | None], list[str]]

    def matrix(self, value: Callable[[list[str]], float]) -> NDArray[np.float64]:
        """Return a value of each cell's modules, `(types, blocks)`; NaN where there are none."""
        rows = [
            [value(self.cells[kind, block]) if (kind, block) in self.cells else np.nan for block in self.blocks]
            for kind in self.types
        ]
        return np.array(rows, dtype=np.float64)

    def of_type(self, kind: str) -> list[str]:
        """Return all modules of a type."""
        return [path for (found, _), paths in self.cells.items() if found == kind for path in paths]

    @property
    def block_labels(self) -> list[str]:
        """The blocks' numbers; with the part of the path that tells lists apart, where there are several."""
        names = [block for block in self.blocks if block is not None]
        lists = {name.rpartition(".")[0] for name in names}
        if len(lists) == 1:
            names = [name.rpartition(".")[2] for name in names]
        else:
            shared = _shared_parts(lists)
            names = [".".join(name.split(".")[shared:]) for name in names]
        return ([OUTSIDE] if None in self.blocks else []) + names

    @property
    def block_axis(self) -> str:
        """What the horizontal axis shows."""
        lists = {block.rpartition(".")[0] for block in self.blocks if block is not None}
        return f"block ({next(iter(lists))})" if len(lists) == 1 and lists != {""} else "block"


def arrange(paths: Iterable[str]) -> Grid:
    """Arrange modules by their paths alone.

    A block is what `block_of` says: the path up to its first number. The type is what follows, with `*` for every
    further number: `self_attn.q_proj`, `experts.*.w1`. A module that is itself an element of a list (of a plain
    `nn.Sequential`, say) is of the type `(element)`; one outside any block is a type of its own.

    Args:
        paths: module paths, in any order; a file may have sorted them as text.
    """
    cells: dict[tuple[str, str | None], list[str]] = {}
    for path in paths:
        block = block_of(path)
        kind = path if block is None else _generic(path[len(block) + 1 :]) or "(element)"
        cells.setdefault((kind, block), []).append(path)
    inside = dict.fromkeys(block for _, block in cells if block is not None)
    lists = list(dict.fromkeys(block.rpartition(".")[0] for block in inside))

    def order(block: str) -> tuple[int, int]:
        name, _, number = block.rpartition(".")
        return lists.index(name), int(number)

    outside = [kind for kind, block in cells if block is None]
    types = dict.fromkeys([*outside, *(kind for kind, _ in cells)])
    blocks: list[str | None] = [*([None] if outside else []), *sorted(inside, key=order)]
    return Grid(list(types), blocks, cells)


def shortened(label: str, length: int = 34) -> str:
    """Return the end of a label that is too long, cut between the parts of a path where that is possible."""
    if len(label) <= length:
        return label
    parts = label.split(".")
    while len(parts) > 1 and len(".".join(parts)) >= length:
        parts.pop(0)
    return f"…{'.'.join(parts)[-(length - 1) :]}"


def _generic(path: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", path)


def _shared_parts(paths: Iterable[str]) -> int:
    """Number of leading parts that all paths share."""
    split = [path.split(".") for path in paths]
    count = 0
    while all(len(parts) > count for parts in split) and len({parts[count] for parts in split}) == 1:
        count += 1
    return count
