"""How commands that show tables or JSON write them."""

import json
import sys
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table


PIPED_WIDTH = 140
"""Columns where the output is no terminal, whose width would limit it."""


def wide_console() -> Console:
    """Return a console for tables with module paths; what is not a terminal gets enough room for them."""
    return Console() if sys.stdout.isatty() else Console(width=PIPED_WIDTH)


def listing(title: str, words: tuple[str, ...], numbers: tuple[str, ...]) -> Table:
    """Return an empty table whose first columns are words, folded where they are too long, and the rest numbers."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in words:
        table.add_column(name, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def facts(title: str) -> Table:
    """Return an empty table of names and values without a header."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column("what", no_wrap=True)
    table.add_column("value", overflow="fold")
    return table


def print_json(content: dict[str, Any]) -> None:
    """Write plain data to stdout as one JSON object, and nothing else."""
    typer.echo(json.dumps(content, indent=2))
