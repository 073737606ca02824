"""The command `peft-fps compare`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from peft_fps.adapter_folders.comparison import Comparison, Values, load_side
from peft_fps.adapter_folders.comparison import compare as measure
from peft_fps.cli.terminal import AsJson, UngroupedVerbose, errors_told, facts, listing, print_json, say, wide_console


WHAT = "A saved FPS adapter (folder, or its name on the Hub), or a selection (the file that select writes)."
First = Annotated[str, typer.Argument(metavar="A", help=WHAT)]
Second = Annotated[str, typer.Argument(metavar="B", help="Another one, of the same base model.")]
Picture = Annotated[
    Path | None,
    typer.Option(
        dir_okay=False,
        metavar="FILE.png",
        help='Draw the overlap by block and type of module. Needs pip install "peft-fps\\[plots]".',
    ),
]


def compare(
    first: First,
    second: Second,
    as_json: AsJson = False,
    picture: Picture = None,
    verbose: UngroupedVerbose = False,
) -> None:
    """Compare two adapters or selections: entries, settings, and values where both have them.

    The overlap is the Jaccard index |A and B| / |A or B| of the entries, 0 to 1. Entries in modules that only one of
    the two has count too. Exit code 1 means that something could not be read, or that the two do not fit one base
    model.

    [bold]Examples[/bold]

        $ peft-fps compare runs/fps/adapter runs/random/adapter

    Does another seed choose the same weights?

        $ peft-fps compare runs/a/selection.safetensors runs/b/selection.safetensors --picture overlap.png

        $ peft-fps compare runs/fps/adapter runs/gps/adapter --json | jq .jaccard
    """
    with errors_told(verbose):
        found = measure(load_side(first), load_side(second))
        if picture is not None:
            from peft_fps.plots.overlap import plot_module_overlap

            picture.parent.mkdir(parents=True, exist_ok=True)
            counts = {row.module: (row.shared, row.either) for row in found.modules}
            plot_module_overlap(counts, f"Overlap of {first} and {second}").savefig(picture)
    if as_json:
        print_json(found.to_dict())
        return
    console = wide_console()
    console.print(_modules(found))
    console.print(_facts(found))
    if picture is not None:
        say(console, f"written: {picture}")


def _modules(found: Comparison) -> Table:
    """Return a line for each module, and the total."""
    of_values = ("mean |A - B|", "same sign") if found.values is not None else ()
    table = listing("Modules", ("module",), ("entries of A", "of B", "shared", "overlap", *of_values))
    for row in found.modules:
        numbers = [f"{number:,}" for number in (row.first, row.second, row.shared)]
        table.add_row(escape(row.module), *numbers, f"{row.jaccard:.4f}", *_cells(row.values))
    table.add_section()
    plain = found.to_dict()
    numbers = [f"{number:,}" for number in (plain["first"]["entries"], plain["second"]["entries"], plain["shared"])]
    table.add_row("total", *numbers, f"{found.overlap.total:.4f}", *_cells(found.values))
    return table


def _cells(values: Values | None) -> tuple[str, ...]:
    """Return mean difference and share of equal signs as text, empty where there are no shared entries."""
    if values is None:
        return ()
    if values.mean_difference is None or values.same_sign is None:
        return "", ""
    return f"{values.mean_difference:.3g}", f"{values.same_sign:.1%}"


def _facts(found: Comparison) -> Table:
    """Return what the two sides are, and what they have in common as a whole."""
    plain, table = found.to_dict(), facts("Comparison")
    for key, letter in (("first", "A"), ("second", "B")):
        side = plain[key]
        table.add_row(letter, escape(f"{side['name']}  ({side['kind']})"))
        table.add_row("", f"{side['entries']:,} entries in {side['modules']:,} modules, {side['file_bytes']:,} bytes")
    table.add_section()
    table.add_row("overlap", f"{found.overlap.total:.4f}  ({plain['shared']:,} shared of {plain['either']:,})")
    values = found.values
    if values is not None and values.mean_difference is not None:
        table.add_row(
            "values, shared entries",
            f"mean |A - B| {values.mean_difference:.3g}, largest {values.largest_difference:.3g}, mean size "
            f"{values.mean_size:.3g}, same sign {values.same_sign:.1%}",
        )
    verdicts = {True: "the same", False: "not the same", None: "not recorded by both"}
    table.add_row("base weights", verdicts[found.same_base])
    for letter, paths in zip("AB", found.only, strict=True):
        if paths:
            more = f" and {len(paths) - 5} more" if len(paths) > 5 else ""
            table.add_row(f"only in {letter}", escape(f"{', '.join(paths[:5])}{more}"))
    table.add_section()
    for name, (one, other) in found.fields.items():
        table.add_row(escape(name), escape(f"A: {one!r}, B: {other!r}"))
    if not found.fields:
        table.add_row("settings", "no difference")
    return table
