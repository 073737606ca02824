"""The command `peft-fps merge`."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from peft_fps.vision import option_types
from peft_fps.cli.terminal import facts, print_json, wide_console
from peft_fps.cli.errors import fail
from peft_fps.cli.inspect import AdapterArgument, JsonFlag, RevisionFlag


class Dtype(str, Enum):
    """Number format of the merged weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


OutputFlag = Annotated[
    Path,
    typer.Option(
        metavar="FOLDER",
        help="Gets the model: config, weights, and processor and tokenizer files, the adapter's before the base "
        "model's. Written whole or not at all.",
    ),
]
BaseFlag = Annotated[
    str | None,
    typer.Option(metavar="FOLDER|HUB_ID", help="The base model. Without it: the one that the adapter records."),
]
DtypeFlag = Annotated[
    Dtype | None,
    typer.Option(
        help="Number format to load, merge and save in. Without it: the base model's own. In half precision changes "
        "that are too small for it vanish, with a warning."
    ),
]
DeviceFlag = Annotated[str, typer.Option(metavar="NAME", help="Where the model is loaded: cpu, cuda, cuda:1.")]
ShardSizeFlag = Annotated[
    str, typer.Option(metavar="SIZE", help="Largest file of weights; a larger model is split into several.")
]
OverwriteFlag = Annotated[bool, typer.Option("--overwrite", help="Replace what is in --output.")]


def merge(
    adapter: AdapterArgument,
    output: OutputFlag,
    base: BaseFlag = None,
    revision: RevisionFlag = None,
    dtype: DtypeFlag = None,
    device: DeviceFlag = "cpu",
    shard_size: ShardSizeFlag = "5GB",
    overwrite: OverwriteFlag = False,
    as_json: JsonFlag = False,
    verbose: flags.VerboseFlag = False,
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

    try:
        folder = adapter_folder(adapter, revision)
        torch.empty(0, device=device)  # before a model is loaded for nothing
        wanted = dtype and dtype.value
        written = run(MergeOptions(folder, output, base, wanted, device, shard_size, overwrite))
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        fail(error, verbose)
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
    console.print(f"saved in {output}", markup=False, highlight=False, soft_wrap=True)
