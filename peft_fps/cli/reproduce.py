"""The commands `peft-fps reproduce vtab-1k` and `peft-fps reproduce fgvc`."""

from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from peft_fps.cli.option_fields import options_of
from peft_fps.cli.terminal import Verbose, add_memory, add_trained, errors_told, say, show_log
from peft_fps.presets import recipe_line
from peft_fps.reproduce.recipes import BENCHMARKS, TASKS
from peft_fps.reproduce.reproduce_options import RECIPE, ReproduceOptions
from peft_fps.vision.option_types import described


ABOUT = {
    "vtab-1k": (
        "Train and evaluate a task of VTAB-1k (1,000 images), as GPS and FPS do.",
        "--data is a folder with train800.txt, val200.txt, train800val200.txt and test.txt, as the scripts of NOAH "
        "and SPT write VTAB-1k. Each line is an image path below the folder and a class index from 0. --data may also "
        "be the folder above it, with one subfolder per task.",
    ),
    "fgvc": (
        "Train and evaluate a task of FGVC (birds, flowers, cars, dogs), as GPS and FPS do.",
        "--data is a folder with VPT's train.json, val.json and test.json, each from image path to class id, beside "
        "the images. Paths begin at the folder, or at images/ or Images/ in it. --data may also be the folder above "
        "it, with one subfolder per task.",
    ),
}
"""By benchmark: what the command does, and the files that it reads."""


def page(benchmark: str, task: str, data: str) -> str:
    """Return the help of a command, with examples for one task and its data."""
    what, files = ABOUT[benchmark]
    command = f"    $ peft-fps reproduce {benchmark} --task {task} --data {data}"
    small = "--model WinKawaks/vit-tiny-patch16-224 --image-size 64 --epochs 2 --limit 100"
    paragraphs = (
        what,
        files,
        "Chooses the epoch on the validation images, reads the test images once, and lists what differs from the "
        "published recipe and from the papers. Everything is checked before anything is computed. Exit code 1 means "
        "that model, data or a combination of options cannot be used; 2, that a single option cannot.",
        f"[bold]Tasks:[/bold] {', '.join(TASKS[benchmark])}",
        "[bold]Examples[/bold]",
        "The published recipe, on a GPU:",
        f"{command} --precision fp16",
        "GPS instead of FPS, trained on training and validation images:",
        f"{command} --method gps --train-on-all",
        "Does everything work? A small model, few small images, two epochs:",
        f"{command} {small}",
    )
    return "\n\n".join(paragraphs)


Augmentation = Annotated[
    Literal["on", "off"] | None,
    described(
        "Random crops and mirroring, mixup, CutMix and label smoothing; in the recipe on for fgvc, off for vtab-1k.",
        RECIPE,
        callback=lambda value: None if value is None else value == "on",
    ),
]


@options_of(ReproduceOptions, without=("benchmark",), augmentation=Augmentation)
def reproduce(context: typer.Context, verbose: Verbose = False, **options: Any) -> None:
    """Train and evaluate a task of the benchmark that the command is named after."""
    show_log()
    console, chosen = Console(), ReproduceOptions(benchmark=str(context.info_name), **options)
    from peft_fps.reproduce.reproduction import reproduce as run  # takes seconds, which --help need not wait for

    with errors_told(verbose):
        results = run(chosen, console)
    console.print(summary(results))
    say(console, f"saved in {chosen.folder}")


def summary(results: dict[str, Any]) -> Table:
    """Return the table at the end of a run.

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
    add_trained(table, results)
    add_memory(table, results)
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
    """Return a value of a setting as a person writes it."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(item)}" for key, item in value.items())
    if isinstance(value, list):
        return " ".join(map(_shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
