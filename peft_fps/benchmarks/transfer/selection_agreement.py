"""How far selections agree: over methods, seeds, numbers of images and tasks; nothing is trained."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from statistics import mean
from typing import Any

from peft import get_peft_model
from tqdm.auto import tqdm
from transformers import set_seed

from peft_fps.benchmarks.tables import TextTable
from peft_fps.benchmarks.transfer.arms import ARMS
from peft_fps.benchmarks.transfer.cell_run import select
from peft_fps.benchmarks.transfer.cells import Cell, Setting
from peft_fps.benchmarks.transfer.tasks import load_task
from peft_fps.config import FPSConfig
from peft_fps.saved_selection import Selection
from peft_fps.vision.upstream_noise import upstream_deprecations


@dataclass(frozen=True)
class Agreement:
    """Jaccard indices of a method's selections, each a mean.

    Attributes:
        method: key of `ARMS`.
        reference: with the reference method's selection on the same task and seed, over tasks.
        seeds: between seeds on the same task; None with one seed.
        tasks: between tasks with seed 0; None with one task.
    """

    method: str
    reference: float
    seeds: float | None
    tasks: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def measure(
    setting: Setting, tasks: Sequence[str], methods: Sequence[str], reference: str, share: float, seeds: int
) -> list[Agreement]:
    """Select by every method on every task with every seed, and compare.

    Args:
        setting: model, image size and batch size.
        tasks: names of tasks.
        methods: keys of `ARMS` that select by neuron, layer or model; `reference` among them or not.
        reference: the method that the others are compared with.
        share: of parameters to select.
        seeds: number of seeds.

    Raises:
        ValueError: a method selects no entries.
    """
    wanted = list(dict.fromkeys([reference, *methods]))
    found: dict[tuple[str, str, int], Selection] = {}
    for task, method, seed in tqdm(
        [(t, m, s) for t in tasks for m in wanted for s in range(seeds)], desc="selections"
    ):
        found[method, task, seed] = selected(Cell(task, method, share, seed, None), setting)

    def agreement(method: str) -> Agreement:
        of_seeds = [
            found[method, task, one].overlap(found[method, task, other]).total
            for task in tasks
            for one, other in combinations(range(seeds), 2)
        ]
        of_tasks = [
            found[method, one, 0].overlap(found[method, other, 0]).total for one, other in combinations(tasks, 2)
        ]
        with_reference = [
            found[method, task, seed].overlap(found[reference, task, seed]).total
            for task in tasks
            for seed in range(seeds)
        ]
        return Agreement(
            method,
            mean(with_reference),
            mean(of_seeds) if of_seeds else None,
            mean(of_tasks) if of_tasks else None,
        )

    return [agreement(method) for method in wanted]


def selected(cell: Cell, setting: Setting) -> Selection:
    """Return what a cell would train.

    Raises:
        ValueError: the method selects no entries of weights.
    """
    arm, task = ARMS[cell.method], load_task(cell.task, setting)
    set_seed(cell.seed)
    base = task.load_base(cell.seed)
    config = arm.build(base, cell.share, cell.seed) if arm.build and arm.budgeted else None
    if not isinstance(config, FPSConfig):
        raise ValueError(f"--methods has {cell.method!r}, which selects no entries, expected methods of this package.")
    collator = task.collator(base)
    with upstream_deprecations():
        model: Any = get_peft_model(base, config)
    if config.needs_calibration:
        select(model, cell, setting, task, collator)
    return Selection.of(model)


def overlap_table(agreements: Sequence[Agreement], share: float) -> TextTable:
    """Return the agreements as a table; the first one is the reference."""
    reference = ARMS[agreements[0].method].label
    lines = [
        (ARMS[found.method].label, *(_show(value) for value in (found.reference, found.seeds, found.tasks)))
        for found in agreements
    ]
    title = f"Jaccard index of selected entries, {share:.2%} of the backbone"
    return TextTable(title, ("method", f"with {reference}", "between seeds", "between tasks"), tuple(lines))


def _show(value: float | None) -> str:
    """Return a number with three digits, nothing for None."""
    return "" if value is None else f"{value:.3f}"
