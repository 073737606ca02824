"""The table at the end of a run."""

from typing import Any

from rich.markup import escape
from rich.table import Table

from peft_fps.presets import recipe_line


def summary(results: dict[str, Any]) -> Table:
    """Return the final table of `peft-fps finetune`.

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
    table.add_section()
    method = preset or "FPS"
    for part, value in results["accuracy"].items():
        images = f"{results['images'][part]:,} images"
        table.add_row(f"{part} accuracy before", f"{value['before']:.2%}  (frozen, linear head; {images})")
        table.add_row(f"{part} accuracy after", f"[bold]{value['after']:.2%}[/bold]  ({method}; {images})")
    table.add_section()
    selection = results["selection"]
    table.add_row(
        "trainable parameters",
        f"{results['trainable_parameters']:,}  ({selection['entries']:,} weights, {selection['biases']:,} biases, "
        f"{selection['head_parameters']:,} in the head)",
    )
    table.add_row("trainable share", f"{selection['share']:.3%} of {selection['base_parameters']:,}  (head left out)")
    table.add_row("adapter size", f"{results['adapter_bytes']:,} bytes  (merged model {results['merged_bytes']:,})")
    memory = results["peak_memory"]
    table.add_row("peak memory", f"{memory['bytes'] / 2**20:,.0f} MiB  ({memory['of']})")
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
