"""GPS: the absolute value of the sum of gradients over batches (arXiv 2312.10136)."""

from functools import partial

from peft_fps.importance.gradient_sums import gather_gradients, loss_of, size_of_sums
from peft_fps.importance.importance import Importance


GRADIENT = Importance(
    name="gradient",
    needs="backward",
    help="the size of the summed gradients (GPS)",
    text=lambda record: f"|sum of gradients|{loss_of(record)}",
    scorer=size_of_sums,
    gather=partial(gather_gradients, term=lambda weight, gradient: gradient),
    recorded=("loss",),
)
