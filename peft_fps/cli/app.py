"""The commands, put together."""

from collections.abc import Callable
from inspect import getdoc
from typing import Annotated, Any

import typer

import peft_fps
from peft_fps.cli.benchmark_cost import cost
from peft_fps.cli.benchmark_derive import derive
from peft_fps.cli.benchmark_overlap import overlap
from peft_fps.cli.benchmark_transfer import transfer
from peft_fps.cli.compare import compare
from peft_fps.cli.finetune import finetune
from peft_fps.cli.inspect import inspect
from peft_fps.cli.merge import merge
from peft_fps.cli.reproduce import page, reproduce
from peft_fps.cli.select import select


LOOKS: dict[str, Any] = {"no_args_is_help": True, "rich_markup_mode": "rich"}

app = typer.Typer(name="peft-fps", add_completion=False, pretty_exceptions_enable=False, **LOOKS)
benchmarks = typer.Typer(**LOOKS, help="Measure on this machine what the method costs and how well it does.")
recipes = typer.Typer(
    **LOOKS,
    help="Train a benchmark's task by the published recipe: backbone, splits, images, weights per neuron, learning "
    "rate and the rest.",
)


def flowing(text: str) -> str:
    """Return a text with each paragraph on one line: rich wraps lines and keeps the breaks that are there.

    Paragraphs with indented lines or items of a list stay as they are.
    """
    paragraphs = [paragraph.splitlines() for paragraph in text.split("\n\n")]
    kept = [any(line.startswith((" ", "- ", "* ")) for line in lines) for lines in paragraphs]
    return "\n\n".join(("\n" if keep else " ").join(lines) for keep, lines in zip(kept, paragraphs, strict=True))


def add(group: typer.Typer, command: Callable[..., None]) -> None:
    """Add a command to a group, with its docstring as help."""
    group.command(help=flowing(getdoc(command) or ""))(command)


def _show_version(wanted: bool) -> None:
    """Print the version and exit, if the option is given."""
    if wanted:
        typer.echo(peft_fps.__version__)
        raise typer.Exit


@app.callback()
def commands(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Selection-based fine-tuning: train the few existing weights that matter, chosen by a forward pass."""


app.add_typer(benchmarks, name="benchmark")
for measuring in (transfer, overlap, derive, cost):
    add(benchmarks, measuring)
app.add_typer(recipes, name="reproduce")
for benchmark, task, data in (("vtab-1k", "cifar100", "vtab-1k"), ("fgvc", "cub", "CUB_200_2011")):
    recipes.command(benchmark, help=page(benchmark, task, data))(reproduce)
for command in (finetune, select, inspect, compare, merge):
    add(app, command)
