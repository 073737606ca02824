"""The position of modules in a picture: transformer blocks from left to right, types of modules from top to bottom."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from peft_fps.selection.blocks import block_of


OUTSIDE = "none"
"""Label of the column of modules outside any block."""


@dataclass(frozen=True)
class Grid:
    """Modules by type and block.

    Attributes:
        types: types of modules from top to bottom. Types outside any block come first.
        blocks: paths of blocks from left to right. None stands for modules outside any block, and comes first.
        cells: paths of the modules of a type in a block. There are several if the block holds a list, such as experts.
    """

    types: list[str]
    blocks: list[str | None]
    cells: Mapping[tuple[str, str | None], list[str]]

    def matrix(self, value: Callable[[list[str]], float]) -> NDArray[np.float64]:
        """Return a number for each cell, `(types, blocks)` float64, with NaN in cells without modules.

        Args:
            value: takes the paths of a cell's modules. Returns their number.
        """
        rows = [
            [value(self.cells[kind, block]) if (kind, block) in self.cells else np.nan for block in self.blocks]
            for kind in self.types
        ]
        return np.array(rows, dtype=np.float64)

    def of_type(self, kind: str) -> list[str]:
        """Return the paths of all modules of a type."""
        return [path for (of_cell, _), paths in self.cells.items() if of_cell == kind for path in paths]

    @property
    def block_labels(self) -> list[str]:
        """Labels of the columns: the numbers of the blocks, behind the part of the path that differs between lists."""
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
        """Label of the horizontal axis, with the path of the list of blocks if there is only one."""
        lists = {block.rpartition(".")[0] for block in self.blocks if block is not None}
        return f"block ({next(iter(lists))})" if len(lists) == 1 and lists != {""} else "block"


def arrange(paths: Iterable[str]) -> Grid:
    """Arrange modules by their paths.

    The block is the path up to its first number; see `block_of`. The type is the rest of the path with `*` for every
    further number, such as `self_attn.q_proj` or `experts.*.w1`. A module that is an element of a list, such as a
    plain `nn.Sequential`, has the type `(element)`. For a module outside any block the type is the path.

    Args:
        paths: module paths in any order, because a file may have sorted them as text.
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
    """Return a label of at most `length` characters: the end of a longer one, cut between parts of a path if possible.

    Args:
        label: a module path, or any other text.
        length: largest number of characters. Default: 34.
    """
    if len(label) <= length:
        return label
    parts = label.split(".")
    while len(parts) > 1 and len(".".join(parts)) >= length:
        parts.pop(0)
    return f"…{'.'.join(parts)[-(length - 1) :]}"


def _generic(path: str) -> str:
    """Return a path with `*` for every part that is a number."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", path)


def _shared_parts(paths: Iterable[str]) -> int:
    """Return the number of leading parts that all paths share."""
    split = [path.split(".") for path in paths]
    count = 0
    while all(len(parts) > count for parts in split) and len({parts[count] for parts in split}) == 1:
        count += 1
    return count
