"""DiffPruning: the change of a weight under hard-concrete gates with an L0 penalty (arXiv 2012.07463)."""

from functools import partial

from peft_fps.gradients import accumulate_gated_changes
from peft_fps.importance.gradient_sums import size_of_sums
from peft_fps.importance.importance import Evidence, Importance, Request
from peft_fps.importance.short_training import gather_changes


def _gather(request: Request) -> tuple[Evidence, dict[str, int]]:
    """Train gated changes with the penalty of the config. The default learning rate is 1e-3."""
    train = partial(accumulate_gated_changes, penalty=request.config.l0_penalty)
    return gather_changes(request, train=train, default_rate=1e-3)


L0 = Importance(
    name="l0",
    needs="training",
    help="the change that survives an L0 penalty (DiffPruning)",
    text=lambda record: "change under hard-concrete gates",
    scorer=size_of_sums,
    gather=_gather,
    recorded=("selection_learning_rate", "selection_epochs", "l0_penalty"),
)
