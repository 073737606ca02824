"""The diagonal of the empirical Fisher information: sums of squared gradients.

The gradients are those of examples (FISH Mask, arXiv 2111.09839; TR-PTS, arXiv 2507.22872), or of batches (SPT).
"""

from peft_fps.importance.gradient_sums import gather_gradients, loss_of, size_of_sums
from peft_fps.importance.importance import Evidence, Importance, Request


def _gather(request: Request) -> tuple[Evidence, dict[str, int]]:
    """Sum up squared gradients of each example or batch, as `FPSConfig.fisher` says."""
    by_example = request.config.fisher == "example"
    return gather_gradients(request, term=lambda weight, gradient: gradient.square(), per_example=by_example)


FISHER = Importance(
    name="fisher",
    needs="backward",
    help="squared gradients of each image (FISH Mask, TR-PTS)",
    text=lambda record: f"squared gradients of each {record.fisher or 'example'}{loss_of(record)}",
    scorer=size_of_sums,
    gather=_gather,
    recorded=("loss", "fisher"),
)
