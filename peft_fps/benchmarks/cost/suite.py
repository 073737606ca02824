"""`peft-fps benchmark cost` as a whole: measure all rows, and write the results."""

import json
import logging
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

from peft_fps.benchmarks.cost.cost_picture import draw
from peft_fps.benchmarks.cost.cost_tables import Result, markdown
from peft_fps.benchmarks.cost.figures import Row
from peft_fps.benchmarks.cost.model_grid import measure_grid
from peft_fps.benchmarks.cost.random_models import build_model
from peft_fps.benchmarks.cost.recipe_costs import measure_recipe
from peft_fps.benchmarks.cost.selection_costs import measure_importances, measure_selection
from peft_fps.benchmarks.cost.sizes import measure_files, measure_memory
from peft_fps.benchmarks.cost.timings import (
    measure_attaching,
    measure_inference,
    measure_merging,
    measure_steps,
    measure_switching,
)
from peft_fps.benchmarks.cost.token_costs import measure_tokens
from peft_fps.benchmarks.cost.workload import Workload
from peft_fps.benchmarks.machine import describe
from peft_fps.benchmarks.malloc import give_back


logger = logging.getLogger(__name__)

ROWS: dict[str, Callable[[Workload], Row]] = {
    "step": measure_steps,
    "memory": measure_memory,
    "selection": measure_selection,
    "importance": measure_importances,
    "merge": measure_merging,
    "switch": measure_switching,
    "inference": measure_inference,
    "file": measure_files,
    "attach": measure_attaching,
    "recipe": measure_recipe,
    "tokens": measure_tokens,
    "grid": measure_grid,
}
"""All rows, in the order of the tables."""


def measure(workload: Workload, rows: Sequence[str]) -> Result:
    """Measure the rows one after another.

    Args:
        workload: the model, and how to measure.
        rows: keys of `ROWS`.

    Raises:
        ValueError: the model or the device is not there.
        RuntimeError: a process died, for lack of memory perhaps.
    """
    workload.prepare()
    parameters = sum(parameter.numel() for parameter in build_model(workload).parameters())
    found = []
    for name in rows:
        found.append(ROWS[name](workload))
        give_back()
    return Result(workload, describe(workload.device), date.today().isoformat(), parameters, tuple(found))


def write(result: Result, folder: Path) -> list[Path]:
    """Write `cost.json`, `cost.md` and, if steps and memory were measured, `cost.png`; returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    data, text, image = (folder / f"cost.{kind}" for kind in ("json", "md", "png"))
    data.write_text(json.dumps(result.to_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    text.write_text(markdown(result), encoding="utf-8")
    image.unlink(missing_ok=True)
    if result.row("step") is None or result.row("memory") is None:
        logger.info("no picture, which needs the rows step and memory")
        return [data, text]
    try:
        draw(result, image)
    except ImportError:
        logger.warning("no picture, since matplotlib is missing: pip install peft-fps[benchmark]")
        return [data, text]
    return [data, text, image]
