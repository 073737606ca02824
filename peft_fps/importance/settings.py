"""The settings of an adapter that importances read."""

from typing import Literal, Protocol


class Settings(Protocol):
    """The fields of `FPSConfig` that importances read; see there."""

    importance: str
    order: Literal["top", "bottom"]
    norm: Literal["l1", "l2"]
    weight_magnitude: bool
    fisher: Literal["example", "batch"]
    loss: Literal["task", "contrastive"]
    selection_learning_rate: float | None
    l0_penalty: float
    granularity: Literal["neuron", "layer", "model", "block", "row", "column"]
    modules_to_save: list[str] | None
    seed: int
