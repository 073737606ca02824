"""The command `peft-fps merge`."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape

from peft_fps.cli.inspect import Adapter, Revision
from peft_fps.cli.terminal import AsJson, Verbose, errors_told, facts, print_json, say, wide_console


Output = Annotated[
    Path,
    typer.Option(
        metavar="FOLDER",
        help="Gets the model: config, weights, and processor and tokenizer files, the adapter's before the base "
        "model's. Written whole or not at all.",
    ),
]
Base = Annotated[
    str | None,
    typer.Option(metavar="FOLDER|HUB_ID", help="The base model. Without it: the one that the adapter records."),
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(
        help="Number format to load, merge and save in. Without it: the base model's own. In half precision changes "
        "that are too small for it vanish, with a warning."
    ),
]
Device = Annotated[str, typer.Option(metavar="NAME", help="Where the model is loaded: cpu, cuda, cuda:1.")]
ShardSize = Annotated[
    str, typer.Option(metavar="SIZE", help="Largest file of weights; a larger model is split into several.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is in --output.")]


def merge(
    adapter: Adapter,
    output: Output,
    base: Base = None,
    revision: Revision = None,
    dtype: Dtype = None,
    device: Device = "cpu",
    shard_size: ShardSize = "5GB",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Write adapter and base model as one plain model, which from_pretrained loads without peft_fps.

    Adapter and base model are checked as on loading. It takes the memory of one copy of the model, in --dtype, and
    of the adapter. The output head is the adapter's if it was saved with one; names of classes are the base model's
    if it has as many, else LABEL_0, LABEL_1 and so on. Exit code 1 means that something could not be used; nothing is
    written then.

    [bold]Examples[/bold]

        $ peft-fps merge runs/finetune/adapter --output runs/merged

    A language model in bfloat16, on a base model in another folder:

        $ peft-fps merge me/llama-fps --base models/llama --dtype bfloat16 --output merged
    """
    import torch

    from peft_fps.cli.saved_adapters.merged_folder import MergeOptions
    from peft_fps.cli.saved_adapters.merged_folder import merge as run
    from peft_fps.cli.saved_adapters.sources import adapter_folder

    with errors_told(verbose, RuntimeError):
        folder = adapter_folder(adapter, revision)
        torch.empty(0, device=device)  # before a model is loaded for nothing
        written = run(MergeOptions(folder, output, base, dtype, device, shard_size, overwrite))
    if as_json:
        print_json(written)
        return
    table = facts("Merged model")
    table.add_row("base model", escape(written["base_model"]))
    table.add_row("class", f"{written['class']}, {written['dtype']}, {written['parameters']:,} parameters")
    table.add_row("merged", f"{written['merged_entries']:,} entries, {written['merged_biases']:,} biases")
    for title, names in (("replaced whole", written["replaced_whole"]), ("copied", written["copied"])):
        if names:
            table.add_row(title, escape(", ".join(names)))
    table.add_row("size", f"{written['bytes']:,} bytes")
    console = wide_console()
    console.print(table)
    say(console, f"saved in {output}")
