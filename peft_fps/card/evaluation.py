"""What a Trainer has measured, and how a model card's metadata states it (`model-index`)."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import EvalResult


PREFIX = "eval_"
COSTS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
"""What the Trainer reports beside metrics, on how long the evaluation took."""

LOCAL_FORMATS = ("csv", "json", "pandas", "parquet", "text", "generator", "imagefolder")
"""Builders of `datasets` that read somebody's own files, which no name on the Hub tells."""

MEASURED = re.compile(r" after [\d,]+ training steps?$")
"""Ends the name of every metric that is stated here, so that it is found again and replaced."""


@dataclass(frozen=True)
class Evaluation:
    """Metrics of an evaluation during training or after it.

    Attributes:
        step: training steps that the evaluated values had gone through.
        metrics: finite numbers by name, without the Trainer's prefix `eval_`.
        dataset: `name` and `type`, which is the id of a data set on the Hub or `"unknown"`; perhaps `config`, `split`.
    """

    step: int
    metrics: Mapping[str, float]
    dataset: Mapping[str, str] = field(default_factory=lambda: {"name": "evaluation set", "type": "unknown"})

    @property
    def when(self) -> str:
        """When the evaluation was, to end a sentence."""
        return f"after {self.step:,} training step{'' if self.step == 1 else 's'}"


def evaluation_at(step: int, log: Iterable[Mapping[str, Any]], dataset: Any = None) -> Evaluation | None:
    """Return what a Trainer's log (`state.log_history`) says about a step, None if there was no evaluation.

    Args:
        step: of training.
        log: entries as the Trainer writes them; those of several evaluations after the same step are united.
        dataset: that was evaluated on, if at hand; only a `datasets.Dataset` tells its name.
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
    """Return the results as huggingface_hub states them, one per metric.

    Args:
        evaluation: none gives none.
        task: as the Hub names it, `"image-classification"` say.
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
    """Whether a result of a card was stated by `eval_results`."""
    return bool(MEASURED.search(result.metric_name or ""))


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
