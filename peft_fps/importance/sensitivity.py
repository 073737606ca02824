"""|w · sum of gradients|: the first-order Taylor estimate of the change of the loss when the weight is removed."""

from functools import partial

from peft_fps.importance.gradient_sums import gather_gradients, loss_of, size_of_sums
from peft_fps.importance.importance import Importance


SENSITIVITY = Importance(
    name="sensitivity",
    needs="backward",
    help="magnitude times gradient",
    text=lambda record: f"|weight x sum of gradients|{loss_of(record)}",
    scorer=size_of_sums,
    # with its sign, because effects of opposite sign in two batches cancel out
    gather=partial(gather_gradients, term=lambda weight, gradient: weight * gradient),
    recorded=("loss",),
)
