"""The cells of a run as tables: accuracies by task, differences to a baseline, learning rates, and costs."""

from collections.abc import Iterable, Sequence
from statistics import mean, median

from peft_fps.benchmarks.tables import MIB, TextTable
from peft_fps.benchmarks.transfer.arms import ARMS
from peft_fps.benchmarks.transfer.cells import Record, RowKey, Setting
from peft_fps.benchmarks.transfer.estimates import Estimate, holm, over_seeds, paired
from peft_fps.benchmarks.transfer.plan import Rates, chosen_rates
from peft_fps.benchmarks.transfer.soft_score import SoftScore, reordered_pairs
from peft_fps.benchmarks.transfer.tasks import rank


class Results:
    """The cells at the chosen learning rates, by row of the table.

    Args:
        records: finished cells; those that only served to choose a learning rate are left out.
        setting: of the run.
        rates: learning rates chosen before, in another run. Default: none.
        split: whose accuracies count, `"test"` or `"validation"`.
    """

    def __init__(
        self, records: Iterable[Record], setting: Setting, rates: Rates | None = None, split: str = "test"
    ) -> None:
        everything = list(records)
        self.split = split
        self.tuned_share = setting.tuned_share
        chosen = chosen_rates(everything, setting) | dict(rates or {})
        self.rates = {
            (method, task): rate
            for method, arm in ARMS.items()
            for (tuned, task), rate in chosen.items()
            if tuned == (arm.tuned_as or method)
        }
        self.rows: dict[RowKey, list[Record]] = {}
        for record in everything:
            key, rate = (record.cell.method, record.cell.task), record.cell.learning_rate
            if key in self.rates and self.rates[key] == rate:
                self.rows.setdefault(record.cell.row, []).append(record)
        self.groups: dict[str, list[str]] = {}
        for record in everything:
            tasks = self.groups.setdefault(record.group, [])
            if record.cell.task not in tasks:
                tasks.append(record.cell.task)
        self.groups = {group: sorted(self.groups[group]) for group in sorted(self.groups, key=rank)}
        self.tasks = [task for tasks in self.groups.values() for task in tasks]

    def accuracies(self, row: RowKey) -> dict[str, dict[int, float]]:
        """Return a row's accuracies by task and seed."""
        found: dict[str, dict[int, float]] = {}
        for record in self.rows.get(row, []):
            found.setdefault(record.cell.task, {})[record.cell.seed] = getattr(record, self.split)
        return found

    @property
    def shares(self) -> list[float]:
        """Shares of trained parameters, largest first."""
        return sorted({share for _, share in self.rows if share is not None}, reverse=True)

    def of_share(self, share: float | None) -> list[RowKey]:
        """Return the rows of one share, methods that have no choice first, in the order of `ARMS`; None: these."""
        shares = dict.fromkeys((None, share))
        return [(method, at) for at in shares for method in ARMS if (method, at) in self.rows]

    def seeds(self, row: RowKey) -> set[int]:
        """Return the seeds of a row that have run on all tasks."""
        accuracies = self.accuracies(row)
        return set.intersection(*(set(accuracies.get(task, {})) for task in self.tasks))


def tables(results: Results, baseline: str) -> list[TextTable]:
    """Return for each share the accuracies and the differences, then accuracy by share, learning rates and costs.

    Args:
        results: of the run.
        baseline: method that the others are compared with, at the same share if it has one.
    """
    found = []
    shares: list[float | None] = [*results.shares] or [None]
    for share in shares:
        rows = results.of_share(share)
        reference = (baseline, share if ARMS[baseline].budgeted else None)
        kind = f"{results.split.capitalize()} accuracy"
        most = "" if share is None else f", at most {share:.2%} of the backbone trained"
        methods = [row for row in rows if not ARMS[row[0]].is_variant]
        variants = [row for row in rows if ARMS[row[0]].is_variant]
        if methods or not variants:
            found.append(accuracy_table(results, methods, f"{kind}, %{most}"))
        if variants:
            beside = [row for row in methods if row == reference]
            found.append(accuracy_table(results, beside + variants, f"{kind} of variants, %{most}"))
        found.append(difference_table(results, [row for row in rows if row != reference], reference))
    by_share = [budget_table(results)] if len(shares) > 1 else []
    return [*found, *by_share, rate_table(results), cost_table(results)]


def accuracy_table(results: Results, rows: Sequence[RowKey], title: str) -> TextTable:
    """Return a line for each row: parameters trained, accuracy by task and group, and the mean.

    The mean is over tasks, its standard error over seeds; it is left out where no seed has been run on all tasks.
    """
    header = ("method", "trained, %", "seeds", *results.tasks, *results.groups, "mean")
    lines = []
    for row in rows:
        accuracies, records = results.accuracies(row), results.rows[row]
        complete = [group for group, tasks in results.groups.items() if set(tasks) <= set(accuracies)]
        lines.append(
            (
                ARMS[row[0]].label,
                f"{100 * mean(record.trained / record.backbone for record in records):.2f}",
                str(len({record.cell.seed for record in records})),
                *(
                    show(Estimate.of(list(accuracies[task].values()))) if task in accuracies else ""
                    for task in results.tasks
                ),
                *(
                    f"{100 * mean(mean(accuracies[task].values()) for task in tasks):.1f}" if group in complete else ""
                    for group, tasks in results.groups.items()
                ),
                show(over_seeds(accuracies, results.tasks)) if results.seeds(row) else "",
            )
        )
    return TextTable(title, header, tuple(lines))


def difference_table(results: Results, rows: Sequence[RowKey], baseline: RowKey) -> TextTable:
    """Return a line for each row: how much better than the baseline, and whether that is more than noise.

    The p value is Holm's, for as many comparisons as there are lines.
    """
    compared = {row: paired(results.accuracies(row), results.accuracies(baseline)) for row in rows}
    differences = {row: difference for row, difference in compared.items() if difference is not None}
    corrected = holm([difference.p for difference in differences.values()])
    lines = []
    for (row, difference), p in zip(differences.items(), corrected, strict=True):
        verdict = "noise" if difference.noise else "better" if difference.mean > 0 else "worse"
        interval = f"{100 * difference.low:+.1f} … {100 * difference.high:+.1f}"
        middle, pairs = f"{100 * difference.mean:+.2f}", str(difference.pairs)
        lines.append((ARMS[row[0]].label, middle, interval, f"{p:.3f}", pairs, verdict))
    share = next((at for _, at in (baseline, *rows) if at is not None), None)
    at_share = "" if share is None else f", at {share:.2%}"
    title = f"Difference to {ARMS[baseline[0]].label}, points of accuracy{at_share}"
    header = ("method", "mean", "95 % interval over tasks", "p (Holm)", "pairs", "verdict")
    return TextTable(title, header, tuple(lines))


def budget_table(results: Results) -> TextTable:
    """Return a line for each method of several shares: its mean over tasks at each, with the seeds that all have."""
    shares = sorted(results.shares)
    lines = []
    for method in ARMS:
        run = [share for share in shares if (method, share) in results.rows and results.seeds((method, share))]
        seeds = set.intersection(*(results.seeds((method, share)) for share in run)) if len(run) > 1 else set()
        if seeds:
            means = {
                share: over_seeds(
                    {
                        task: {seed: value for seed, value in found.items() if seed in seeds}
                        for task, found in results.accuracies((method, share)).items()
                    },
                    results.tasks,
                )
                for share in run
            }
            lines.append(
                (
                    ARMS[method].label,
                    str(len(seeds)),
                    *(show(means[share]) if share in means else "" for share in shares),
                )
            )
    header = ("method", "seeds", *(f"{100 * share:g}%" for share in shares))
    return TextTable(f"Mean {results.split} accuracy, %, by share of the backbone trained", header, tuple(lines))


def rate_table(results: Results) -> TextTable:
    """Return the learning rate that was chosen for each method and task, those of variants that share it left out."""
    run = {ARMS[method].tuned_as or method for method, _ in results.rows}
    known = {method for method, _ in results.rates if method in run and ARMS[method].learning_rates}
    tuned = [method for method in ARMS if method in known]
    lines = []
    for method in tuned:
        rates = [results.rates.get((method, task)) for task in results.tasks]
        lines.append((ARMS[method].label, *("" if rate is None else f"{rate:g}" for rate in rates)))
    return TextTable("Learning rates, chosen on validation images", ("method", *results.tasks), tuple(lines))


def cost_table(results: Results) -> TextTable:
    """Return medians over cells: seconds and memory of selection and training, and the size of the adapter's file.

    Of methods that have a choice, cells of the share at which learning rates are chosen, which all of them have. PSCP
    stands there where full fine-tuning, whose costs are its constants, was run.
    """
    lines = []
    scores = _scores(results)
    for row in results.of_share(results.tuned_share):
        records = results.rows[row]
        lines.append(
            (
                ARMS[row[0]].label,
                f"{median(record.seconds['select'] for record in records):.1f}",
                f"{median(record.bytes['select'] for record in records) / MIB:.1f}",
                f"{median(record.seconds['train'] for record in records):.0f}",
                f"{median(record.bytes['train'] for record in records) / MIB:.1f}",
                f"{max(record.bytes['adapter'] for record in records) / 1024:,.0f}",
                *((f"{100 * scores[row].value():.1f}",) if row in scores else ("",) * bool(scores)),
            )
        )
    header = (
        *("method", "selection, s", "its peak, MiB", "training, s", "a step's peak, MiB", "largest file, KiB"),
        *(("PSCP",) if scores else ()),
    )
    title = f"What the methods cost here, at {results.tuned_share:.2%} (cells run side by side: the times are a hint)"
    return TextTable(title + _sensitivity(list(scores.values())), header, tuple(lines))


def _scores(results: Results) -> dict[RowKey, SoftScore]:
    """Return what PSCP is made of, for every row that has run on all tasks; nothing without full fine-tuning."""
    full = results.rows.get(("full", None), [])
    if not full:
        return {}
    most = median(record.bytes["train"] for record in full)
    found = {}
    for row in results.of_share(results.tuned_share):
        if results.seeds(row):
            records = results.rows[row]
            found[row] = SoftScore(
                accuracy=over_seeds(results.accuracies(row), results.tasks).mean,
                trained=mean(record.trained / record.backbone for record in records),
                operations=mean(record.operations for record in records),
                memory=median(record.bytes["train"] for record in records) / most,
            )
    return found


def _sensitivity(scores: Sequence[SoftScore]) -> str:
    """Return half a sentence: how many pairs of methods PSCP orders otherwise with another weight β."""
    if len(scores) < 2:
        return ""
    p, f, m = (f"{share:.0%}" for share in reordered_pairs(scores))
    return (
        f"; PSCP with every β at 1: of the pairs of methods, {p} change places when β_p is halved or doubled, {f} for "
        f"β_f, {m} for β_m"
    )


def show(estimate: Estimate) -> str:
    """Return percent, with the standard error where there is one."""
    error = "" if estimate.error is None else f" ± {100 * estimate.error:.1f}"
    return f"{100 * estimate.mean:.1f}{error}"
