"""FAR: the absolute change of a weight in a short fine-tuning (arXiv 2205.01541)."""

from functools import partial

from peft_fps.gradients import accumulate_movement
from peft_fps.importance.gradient_sums import size_of_sums
from peft_fps.importance.importance import Importance
from peft_fps.importance.short_training import gather_changes


MOVEMENT = Importance(
    name="movement",
    needs="training",
    help="the change in a short fine-tuning (FAR)",
    text=lambda record: "movement in a short fine-tuning",
    scorer=size_of_sums,
    gather=partial(gather_changes, train=accumulate_movement, default_rate=3e-4),
    recorded=("selection_learning_rate", "selection_epochs"),
)
