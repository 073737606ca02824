"""What a Trainer has measured, as the metadata of a model card states it (`model-index`)."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from huggingface_hub import EvalResult

from peft_fps.layers.adapter_state import Evaluation


PREFIX = "eval_"
COSTS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
"""What the Trainer reports beside metrics, on how long the evaluation took."""

LOCAL_FORMATS = ("csv", "json", "pandas", "parquet", "text", "generator", "imagefolder")
"""Builders of `datasets` that read somebody's own files, which no name on the Hub tells."""

MEASURED = re.compile(r" after [\d,]+ training steps?$")
"""Ends the name of every metric that is stated here, so that it is found again and replaced."""


def evaluation_at(step: int, log: Iterable[Mapping[str, Any]], dataset: Any = None) -> Evaluation | None:
    """Return the evaluation after a training step, from a Trainer's log; None if there was none.

    Args:
        step: number of training steps.
        log: the Trainer's `state.log_history`. Several evaluations after the same step are united.
        dataset: the evaluated data set, if at hand. Only a `datasets.Dataset` tells its name.
    """
    metrics = {
        key.removeprefix(PREFIX): float(value)
        for entry in log
        if entry.get("step") == step
        for key, value in entry.items()
        if key.startswith(PREFIX) and not key.endswith(COSTS) and _finite(value)
    }
    if not metrics:
        return None
    builder = getattr(dataset, "builder_name", None)
    if not isinstance(builder, str) or builder in LOCAL_FORMATS:
        return Evaluation(step, metrics)
    named = {"name": builder, "type": builder}
    named |= {part: str(value) for part, value in (
        ("config", getattr(dataset, "config_name", None)), ("split", getattr(dataset, "split", None))
    ) if value is not None}  # fmt: skip
    return Evaluation(step, metrics, named)


def eval_results(evaluation: Evaluation | None, task: str) -> list[EvalResult]:
    """Return the metrics of an evaluation in the form of huggingface_hub, one result per metric.

    Args:
        evaluation: the evaluation; None gives no results.
        task: the Hub's name of the task, `"image-classification"` for instance.
    """
    if evaluation is None:
        return []
    dataset: dict[str, Any] = {f"dataset_{part}": value for part, value in evaluation.dataset.items()}
    return [
        EvalResult(
            task_type=task, metric_type=name, metric_name=f"{name} {evaluation.when}", metric_value=value, **dataset
        )
        for name, value in evaluation.metrics.items()
    ]


def is_measured(result: EvalResult) -> bool:
    """Return whether `eval_results` has made this result of a card."""
    return bool(MEASURED.search(result.metric_name or ""))


def _finite(value: Any) -> bool:
    """Return whether a value is a finite number, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
