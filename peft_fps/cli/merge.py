"""The command `peft-fps merge`."""

from typing import Any

import torch
from rich.markup import escape

from peft_fps.adapter_folders.merged_folder import MergeOptions
from peft_fps.adapter_folders.merged_folder import merge as run
from peft_fps.adapter_folders.sources import adapter_folder
from peft_fps.cli.inspect import Adapter, Revision
from peft_fps.cli.option_fields import options_of
from peft_fps.cli.terminal import AsJson, UngroupedVerbose, errors_told, facts, print_json, say, wide_console


@options_of(MergeOptions, without=("adapter",))
def merge(
    adapter: Adapter,
    revision: Revision = None,
    as_json: AsJson = False,
    verbose: UngroupedVerbose = False,
    **options: Any,
) -> None:
    """Write adapter and base model as one plain model, which from_pretrained loads without peft_fps.

    If the adapter selects tokens, import peft_fps before you load the merged model; a warning says so.

    Adapter and base model are checked as on loading. The base model's safetensors files are merged one after the
    other. This takes memory for the largest of them, in --dtype, and for the adapter. Where it is impossible (pickled
    or quantised weights, targets that transformers joins or splits on loading), the model is loaded whole, in the
    memory of one copy of it, and one line says why. The result is the same.

    The output head is the adapter's if it was saved with one. Names of classes are the base model's if it has as
    many, else LABEL_0, LABEL_1 and so on. Exit code 1 means that something could not be used; nothing is written then.

    [bold]Examples[/bold]

        $ peft-fps merge runs/finetune/adapter --output runs/merged

    A language model in bfloat16, on a base model in another folder:

        $ peft-fps merge me/llama-fps --base models/llama --dtype bfloat16 --output merged
    """
    with errors_told(verbose, RuntimeError):
        folder = adapter_folder(adapter, revision)
        torch.empty(0, device=options["device"])  # before a model is loaded for nothing
        written = run(MergeOptions(folder, **options))
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
    say(console, f"saved in {options['output']}")
