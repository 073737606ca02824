"""The command `peft-fps finetune`."""

from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from peft_fps.cli.option_fields import options_of
from peft_fps.cli.terminal import Verbose, add_memory, add_trained, errors_told, say, show_log
from peft_fps.presets import recipe_line
from peft_fps.vision.finetune_options import FinetuneOptions


@options_of(FinetuneOptions)
def finetune(verbose: Verbose = False, **options: Any) -> None:
    """Fine-tune an image classifier, and compare it with a linear head on the frozen model.

    Loads model and data, fits the linear head, chooses the weights to train (calibration) and shows the selection,
    trains, evaluates, saves the adapter, merges it, and verifies that the merged model and the reloaded adapter
    predict the same. Exit code 1 means that they do not, or that model, data or a combination of options cannot be
    used; 2, that a single option cannot.

    [bold]Examples[/bold]

    The embedded model and data, in about a minute on two cores:

        $ peft-fps finetune

    A model from the Hub on a folder of photographs, train/CLASS/*.jpg and test/CLASS/*.jpg:

        $ peft-fps finetune --model google/vit-base-patch16-224-in21k --data photos --output runs/photos

    A quick look on a laptop: smaller images, fewer epochs:

        $ peft-fps finetune --model WinKawaks/vit-tiny-patch16-224 --data photos --image-size 112 --epochs 10

    One of timm's models by name, its weights from a local file:

        $ peft-fps finetune --model timm:vit_tiny_patch16_224@weights.safetensors --data photos

    Does the selection matter? The same number of weights, at random:

        $ peft-fps finetune --importance random --output runs/random

    Other published methods, with their own training; the second for fewer epochs:

        $ peft-fps finetune --preset bitfit --output runs/bitfit

        $ peft-fps finetune --preset gps --epochs 20 --output runs/gps
    """
    chosen, console = FinetuneOptions(**options), Console()
    show_log()
    from peft_fps.vision.finetuning import finetune as run  # the imports take seconds, which --help need not wait for

    with errors_told(verbose):
        results = run(chosen, console)
    console.print(summary(results))
    say(console, f"saved in {chosen.output}")
    if not all(checked["holds"] for checked in results["agreement"].values()):
        typer.echo("Error: what was saved does not predict what the trained model does; see the table.", err=True)
        raise typer.Exit(1)


def summary(results: dict[str, Any]) -> Table:
    """Return the table at the end of a run.

    Args:
        results: what `peft_fps.vision.finetuning.finetune` returns.
    """
    table = Table(title="peft-fps finetune", title_justify="left", show_header=False)
    table.add_column("what", no_wrap=True)
    table.add_column("value")
    preset = results["options"]["preset"]
    if preset is not None:
        table.add_row("preset", preset)
    if results["weights"] is not None:
        table.add_row("base model", escape(f"{results['model']}  ({results['weights']})"))
    table.add_row("selected by", results["selection"]["method"])
    table.add_row("recipe", recipe_line(results["recipe"]))
    rates = {"bias_lr": "biases", "norm_lr": "norms", "head_lr": "the head"}
    own = [f"{rates[name]} {rate:.2g}" for name, rate in results["rates"].items()]
    if own:
        table.add_row("other rates", ", ".join(own))
    if results["centring"]:
        table.add_row("inputs", results["centring"])
    table.add_section()
    method = preset or "FPS"
    for part, value in results["accuracy"].items():
        images = f"{results['images'][part]:,} images"
        table.add_row(f"{part} accuracy before", f"{value['before']:.2%}  (frozen, linear head; {images})")
        table.add_row(f"{part} accuracy after", f"[bold]{value['after']:.2%}[/bold]  ({method}; {images})")
    selection = results["selection"]
    table.add_section()
    add_trained(table, results)
    table.add_row("trainable share", f"{selection['share']:.3%} of {selection['base_parameters']:,}  (head left out)")
    table.add_row("adapter size", f"{results['adapter_bytes']:,} bytes  (merged model {results['merged_bytes']:,})")
    add_memory(table, results)
    table.add_section()
    for stage, seconds in results["seconds"].items():
        table.add_row(f"seconds, {stage}", f"{seconds:.1f}")
    table.add_row("seconds, all together", f"{sum(results['seconds'].values()):.1f}")
    table.add_section()
    for kind, checked in results["agreement"].items():
        verdict = "[green]same predictions[/green]" if checked["holds"] else "[red]DIFFERS[/red]"
        what = {"merged": "merged model", "reloaded": "reloaded adapter"}[kind]
        table.add_row(
            what,
            f"{verdict}  ({checked['different_predictions']:,} of {checked['images']:,} differ, logits by "
            f"{checked['largest_difference']:.0e})",
        )
    return table
