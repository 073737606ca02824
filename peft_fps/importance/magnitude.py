"""Weight magnitude: the FPS score with all activations equal; the score of NeuroAda (arXiv 2510.18940)."""

from typing import Any

from torch import Tensor

from peft_fps.importance.importance import Importance, Score
from peft_fps.importance.settings import Settings
from peft_fps.layers.entry_layer import EntryLayer


def magnitude(weight: Tensor) -> Tensor:
    """Return |w| of a weight `(rows, inputs)`, in float32."""
    return weight.float().abs()


def _scorer(layer: EntryLayer, path: str, config: Settings, evidence: Any) -> Score:
    """Return the weight magnitudes of a layer as its scores; see `Importance.scorer`."""
    return lambda first, last: magnitude(layer.weight_rows(first, last))


MAGNITUDE = Importance(
    name="magnitude", needs="nothing", help="that alone", text=lambda record: "weight magnitude", scorer=_scorer
)
