"""What commands write to the terminal: tables, JSON, log records and errors."""

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from peft_fps.benchmarks.tables import TextTable
from peft_fps.vision.option_types import OUTPUT


logger = logging.getLogger(__name__)

PIPED_WIDTH = 140
"""Columns where the output is no terminal, whose width would limit it."""

LONGEST_ERROR = 600
"""Characters of an error that are shown."""

UNUSABLE = (ValueError, TypeError, OSError, ImportError)
"""Errors that say that something a command was given cannot be used."""

WHERE = "Show where in the code an error arose."
Verbose = Annotated[bool, typer.Option("--verbose", help=WHERE, rich_help_panel=OUTPUT)]
UngroupedVerbose = Annotated[bool, typer.Option("--verbose", help=WHERE)]
"""The same option for commands whose options have no panels in `--help`."""
AsJson = Annotated[bool, typer.Option("--json", help="Write one JSON object to stdout instead of tables.")]


def show_log() -> None:
    """Let log records appear on stderr."""
    logging.basicConfig(format="%(message)s", handlers=[RichHandler(console=Console(stderr=True), show_path=False)])


@contextmanager
def errors_told(verbose: bool, *besides: type[Exception]) -> Iterator[None]:
    """End the command with exit code 1 and a message if something that it was given cannot be used.

    Args:
        verbose: show where in the code as well.
        besides: further kinds of errors than `UNUSABLE`.

    Raises:
        typer.Exit: there was such an error.
    """
    kinds: tuple[type[Exception], ...] = (*UNUSABLE, *besides)
    try:
        yield
    except kinds as error:
        if verbose:
            logger.error("the error in full", exc_info=error)
        typer.echo(f"Error: {one_line(str(error)) or type(error).__name__}", err=True)
        raise typer.Exit(1) from error


def one_line(text: str) -> str:
    """Return a text on one line; of a very long one, the beginning."""
    text = " ".join(text.split())
    return text if len(text) <= LONGEST_ERROR else f"{text[: LONGEST_ERROR - 3]}..."


def wide_console() -> Console:
    """Return a console for tables with module paths; what is not a terminal gets enough room for them."""
    return Console() if sys.stdout.isatty() else Console(width=PIPED_WIDTH)


def say(console: Console, text: str) -> None:
    """Print a text as it is: without markup, colours and line breaks."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


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


def add_trained(table: Table, results: dict[str, Any]) -> None:
    """Add the row on trained parameters of the results of a fine-tuning."""
    selection = results["selection"]
    table.add_row(
        "trainable parameters",
        f"{results['trainable_parameters']:,}  ({selection['entries']:,} weights, {selection['biases']:,} biases, "
        f"{selection['head_parameters']:,} in the head)",
    )


def add_memory(table: Table, results: dict[str, Any]) -> None:
    """Add the row on the peak of memory of the results of a fine-tuning."""
    memory = results["peak_memory"]
    table.add_row("peak memory", f"{memory['bytes'] / 2**20:,.0f} MiB  ({memory['of']})")


def show_text_table(console: Console, table: TextTable) -> None:
    """Print a table of a benchmark, its words to the left and its numbers to the right."""
    shown = Table(title=table.title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column, name in enumerate(table.header):
        words = column < table.words
        shown.add_column(name, justify="left" if words else "right", no_wrap=words and table.words == 1)
    for line in table.lines:
        shown.add_row(*line)
    console.print(shown)


def print_json(content: dict[str, Any]) -> None:
    """Write plain data to stdout as one JSON object, and nothing else."""
    typer.echo(json.dumps(content, indent=2))
