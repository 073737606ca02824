"""The table at the end of a reproduction."""

from typing import Any

from rich.markup import escape
from rich.table import Table

from peft_fps.presets import recipe_line
from peft_fps.reproduce.recipes import BENCHMARKS


def summary(results: dict[str, Any]) -> Table:
    """Return the final table of `peft-fps reproduce`.

    Args:
        results: what `peft_fps.reproduce.reproduction.reproduce` returns.
    """
    table = Table(title=f"peft-fps reproduce {results['benchmark']}", title_justify="left", show_header=False)
    table.add_column("what", no_wrap=True)
    table.add_column("value")
    table.add_row("task", f"{BENCHMARKS[results['benchmark']]} {results['task']}")
    table.add_row("selected by", f"{results['method']}: {escape(results['selection']['method'])}")
    table.add_row("training", recipe_line(results["recipe"]))
    kept = results["kept"]
    table.add_row("weights kept", f"{kept['weights']}, epoch {kept['epoch']}  (chosen by {kept['chosen_by']})")
    table.add_section()
    for part, value in results["accuracy"].items():
        table.add_row(f"{part} accuracy", f"[bold]{value:.2%}[/bold]  ({results['images'][part]:,} images)")
    for method, percent in results["published"].items():
        table.add_row(f"printed for {method.upper()}", f"{percent:.2f}%  (the whole test split, ViT-B/16)")
    table.add_section()
    selection = results["selection"]
    table.add_row(
        "trainable parameters",
        f"{results['trainable_parameters']:,}  ({selection['entries']:,} weights, {selection['biases']:,} biases, "
        f"{selection['head_parameters']:,} in the head)",
    )
    memory = results["peak_memory"]
    table.add_row("peak memory", f"{memory['bytes'] / 2**20:,.0f} MiB  ({memory['of']})")
    table.add_row("seconds", ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in results["seconds"].items()))
    table.add_section()
    for name, pair in results["differences"].items():
        table.add_row(f"differs: {name}", escape(f"{_shown(pair['here'])}  (recipe: {_shown(pair['recipe'])})"))
    if not results["differences"]:
        table.add_row("differs", "nothing")
    for sentences in results["deviations"]:
        table.add_row("from the papers", escape(sentences))
    return table


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(item)}" for key, item in value.items())
    if isinstance(value, list):
        return " ".join(map(_shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
