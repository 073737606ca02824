"""Means, standard errors and paired differences of accuracies."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from scipy.stats import sem, t


Accuracies = Mapping[str, Mapping[int, float]]
"""Of one method: by task, by seed."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error, None where there is one value only."""

    mean: float
    error: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        """Estimate the mean of what the values are drawn from."""
        return cls(mean(values), float(sem(values)) if len(values) > 1 else None)


@dataclass(frozen=True)
class Difference:
    """How much a method is better than the baseline on the same tasks with the same seeds.

    Attributes:
        mean: over tasks, each the mean over seeds.
        low: of the 95 % confidence interval (Student's t over tasks).
        high: likewise.
        pairs: cells that both have.
        p: of Student's two-sided test that the mean is 0.
    """

    mean: float
    low: float
    high: float
    pairs: int
    p: float

    @property
    def noise(self) -> bool:
        """Whether the interval holds zero."""
        return self.low <= 0 <= self.high


def over_seeds(accuracies: Accuracies, tasks: Sequence[str]) -> Estimate:
    """Return the mean over tasks with the standard error over the seeds that all of the tasks have.

    Raises:
        ValueError: no seed has all tasks.
    """
    seeds = set.intersection(*(set(accuracies.get(task, {})) for task in tasks))
    if not seeds:
        raise ValueError(f"No seed was run on all of the tasks {', '.join(tasks)}.")
    return Estimate.of([mean(accuracies[task][seed] for task in tasks) for seed in sorted(seeds)])


def paired(accuracies: Accuracies, baseline: Accuracies) -> Difference | None:
    """Compare a method with the baseline, paired over tasks and seeds; None with fewer than two tasks in common.

    Cells of one task are not independent, so its seeds count as one observation.
    """
    by_task: list[float] = []
    pairs = 0
    for task in sorted(set(accuracies) & set(baseline)):
        seeds = sorted(set(accuracies[task]) & set(baseline[task]))
        if seeds:
            by_task.append(mean(accuracies[task][seed] - baseline[task][seed] for seed in seeds))
            pairs += len(seeds)
    if len(by_task) < 2:
        return None
    # not of scipy's ttest_1samp, which warns where all tasks differ alike
    middle, error, freedom = mean(by_task), float(sem(by_task)), len(by_task) - 1
    margin = float(t.ppf(0.975, freedom)) * error
    p = 2 * float(t.sf(abs(middle) / error, freedom)) if error else float(middle == 0)
    return Difference(middle, middle - margin, middle + margin, pairs, p)


def holm(values: Sequence[float]) -> list[float]:
    """Return p values corrected for their number, so that one is below α by chance with a probability of at most α.

    Source: S. Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6,
    1979.

    Args:
        values: p values of all comparisons, in any order.
    """
    corrected, least = [0.0] * len(values), 0.0
    for rank, place in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        least = max(least, min(1.0, (len(values) - rank) * values[place]))
        corrected[place] = least
    return corrected
