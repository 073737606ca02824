"""Cut a split in two."""

from collections import Counter
from collections.abc import Sequence
from math import ceil

from sklearn.model_selection import train_test_split


def split_rows(labels: Sequence[int], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Draw a share of the rows, the classes in proportion where there are enough rows for that.

    Args:
        labels: class index of each row.
        share: share to draw, between 0 and 1.
        seed: the same seed draws the same rows.

    Returns:
        The rows that stay and the rows that are drawn, both in ascending order.

    Raises:
        ValueError: there are fewer than two rows.
    """
    rows = len(labels)
    if rows < 2:
        raise ValueError(f"--data has {rows} image to split in two, expected more.")
    counts = Counter(labels)
    drawn = ceil(rows * share)
    proportional = min(counts.values()) > 1 and len(counts) <= min(drawn, rows - drawn)
    kept, taken = train_test_split(
        range(rows), test_size=drawn, random_state=seed, stratify=labels if proportional else None
    )
    return sorted(kept), sorted(taken)
