"""The command `peft-fps inspect`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from peft_fps.adapter_folders.adapter_contents import Inspection
from peft_fps.adapter_folders.soundness import inspect_adapter
from peft_fps.adapter_folders.sources import adapter_folder
from peft_fps.cli.terminal import (
    AsJson,
    UngroupedVerbose,
    errors_told,
    facts,
    listing,
    one_line,
    print_json,
    say,
    wide_console,
)


SHOWN = (
    *("importance", "order", "norm", "weight_magnitude", "loss", "granularity", "budget", "per_neuron", "bias"),
    *("token_keep_rate", "token_gate", "seed", "task_type", "format_version"),
)
"""Fields of the config in the table; --json has all."""

Adapter = Annotated[
    str, typer.Argument(metavar="ADAPTER", help="Folder of a saved FPS adapter, or its name on the Hub.")
]
Revision = Annotated[
    str | None, typer.Option(metavar="NAME", help="Branch, tag or commit on the Hub. Default: the main branch.")
]
Picture = Annotated[
    Path | None,
    typer.Option(
        dir_okay=False,
        metavar="FILE.png",
        help="Draw where the entries lie, which inputs they read and how far biases have moved. Needs "
        'pip install "peft-fps\\[plots]".',
    ),
]


def inspect(
    adapter: Adapter,
    revision: Revision = None,
    as_json: AsJson = False,
    picture: Picture = None,
    verbose: UngroupedVerbose = False,
) -> None:
    """Show what an adapter holds, and check its files, without its base model.

    Makes every check of loading that needs no base model: of the config, of the file's digest, keys, dtypes and
    shapes, of the range, order and finite values of the entries, and of the tensors of modules that are saved whole.
    Exit code 1 means that a check failed, which the output names, or that there is no FPS adapter.

    [bold]Examples[/bold]

        $ peft-fps inspect runs/finetune/adapter

        $ peft-fps inspect me/vit-fps --revision main --picture selection.png

    How many weights were trained?

        $ peft-fps inspect runs/finetune/adapter --json | jq .totals.entries
    """
    with errors_told(verbose):
        found = inspect_adapter(adapter_folder(adapter, revision))
        plain = found.to_dict()
        if picture is not None and found.problem is None:
            from peft_fps.plots.selection import draw_selection

            picture.parent.mkdir(parents=True, exist_ok=True)
            draw_selection(found.entries, found.biases).savefig(picture)
    if as_json:
        print_json(plain)
    else:
        console = wide_console()
        console.print(_modules(found, plain["totals"]))
        console.print(_facts(found, plain, adapter))
        if picture is not None and found.problem is None:
            say(console, f"written: {picture}")
    with errors_told(verbose):
        if found.problem is not None:
            raise ValueError(f"{adapter} does not pass: {found.problem}")


def _modules(found: Inspection, totals: dict[str, Any]) -> Table:
    """Return a line for each module, and the total."""
    names = ("neurons", "fan-in", "entries", "per neuron", "share", "biases", "bytes")
    table = listing("Modules", ("module",), names)
    for layer in found.layers:
        numbers = (layer.neurons, layer.inputs, layer.entries, layer.biases, layer.bytes)
        neurons, inputs, entries, biases, size = (f"{number:,}" for number in numbers)
        ratio = f"{layer.entries / layer.neurons:.2f}" if layer.neurons else ""
        table.add_row(escape(layer.module), neurons, inputs, entries, ratio, f"{layer.share:.3%}", biases, size)
    rows = found.neurons
    table.add_section()
    table.add_row(
        "total",
        f"{rows:,}",
        "",
        f"{totals['entries']:,}",
        f"{totals['entries'] / rows:.2f}" if rows else "",
        f"{totals['share']:.3%}",
        f"{totals['biases']:,}",
        f"{totals['bytes']:,}",
    )
    return table


def _facts(found: Inspection, plain: dict[str, Any], adapter: str) -> Table:
    """Return base model, method, settings, sizes and checks."""
    base, totals, table = plain["base_model"], plain["totals"], facts(escape(f"FPS adapter {adapter}"))
    at = f", revision {base['revision']}" if base["revision"] else ""
    table.add_row("base model", escape(f"{base['name'] or 'not recorded'}{at}"))
    if base["class"]:
        table.add_row("its class", escape(str(base["class"])))
    fingerprint = base["fingerprint"]
    digest = f"{fingerprint['sha256']} ({fingerprint['dtype']})" if fingerprint else "not recorded"
    table.add_row("its fingerprint", escape(digest))
    table.add_section()
    table.add_row("selected by", escape(found.method))
    settings = {name: found.settings[name] for name in SHOWN if found.settings.get(name) is not None}
    table.add_row("config", escape(", ".join(f"{name}={value!r}" for name, value in settings.items())))
    if found.record is not None and found.record.selecting_blocks is not None:
        table.add_row("tokens selected in blocks", ", ".join(map(str, found.record.selecting_blocks)))
    record = plain["calibration"]
    known = ", ".join(f"{key}={value!r}" for key, value in record.items()) if record else "none"
    table.add_row("calibration", escape(known))
    table.add_section()
    for name, tensor in plain["heads"].items():
        table.add_row("saved whole", escape(f"{name}  {tuple(tensor['shape'])}, {tensor['dtype']}"))
    table.add_row(
        "trained",
        f"{totals['entries']:,} entries, {totals['biases']:,} biases, {totals['head_parameters']:,} saved whole",
    )
    table.add_row("adapter file", f"{totals['file_bytes']:,} bytes")
    table.add_section()
    verdicts = {True: "[green]passed[/green]", False: "[red]FAILED[/red]", None: "not checked"}
    for check in found.checks:
        says = f"  {escape(one_line(check.says))}" if check.says else ""
        table.add_row(f"check: {check.name}", f"{verdicts[check.passed]}{says}")
    return table
