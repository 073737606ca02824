"""Tables of benchmarks as text and as Markdown."""

from collections.abc import Iterable
from dataclasses import dataclass


MIB = 2**20


@dataclass(frozen=True)
class TextTable:
    """A table whose cells are text.

    Attributes:
        title: one line.
        header: names of the columns.
        lines: cells of each line, as many as the header has.
        words: number of columns that hold words, the first ones; all others hold numbers.
    """

    title: str
    header: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    words: int = 1


def titled_markdown(table: TextTable) -> str:
    """Return a table as Markdown under its title in bold, without a line break at the end."""
    return f"**{table.title}**\n\n{markdown_table(table)}"


def markdown_table(table: TextTable) -> str:
    """Return a table as Markdown without its title; numbers are aligned to the right."""
    rule = ["---" if column < table.words else "---:" for column in range(len(table.header))]
    return "\n".join([_line(table.header), _line(rule), *map(_line, table.lines)])


def _line(cells: Iterable[str]) -> str:
    """Return the cells as a line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"
