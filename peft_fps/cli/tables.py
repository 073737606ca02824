"""Tables of benchmarks on the terminal."""

from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table as Shown


if TYPE_CHECKING:
    from peft_fps.benchmarks.cost.cost_tables import Table  # its module imports PyTorch, which --help need not wait for


def show(console: Console, table: "Table") -> None:
    """Print a table, its words to the left and its numbers to the right."""
    shown = Shown(title=table.title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column, name in enumerate(table.header):
        words = column < table.words
        shown.add_column(name, justify="left" if words else "right", no_wrap=words and table.words == 1)
    for line in table.lines:
        shown.add_row(*line)
    console.print(shown)
