"""What training and prediction take: a split of labelled examples, and what makes batches of them."""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor


class LabelledExamples(Protocol):
    """A split of whatever a collator makes batches of.

    Attributes:
        labels: `(examples,)`, class indices.
    """

    labels: Tensor

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> dict[str, Any]: ...


Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]
"""Makes a batch of examples: arguments of a model, `labels` among them."""
