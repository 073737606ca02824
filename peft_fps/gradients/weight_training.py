"""How far each weight moves in a short full fine-tuning (FAR, Vucetic et al. 2022, arXiv 2205.01541)."""

from collections.abc import Mapping

from torch import Tensor, nn

from peft_fps.calibration import Pass, undisturbed
from peft_fps.gradients.accumulate import Accumulator
from peft_fps.gradients.backward_pass import BatchLoss, Weight, run_backward
from peft_fps.gradients.hooks import checkpointed, gradients_handed_over
from peft_fps.gradients.trial import distinct, hand_in, on_trial


def accumulate_movement(
    model: nn.Module,
    weights: Mapping[str, Weight],
    others: Mapping[str, nn.Parameter],
    data: Pass,
    loss: BatchLoss,
    accumulators: Mapping[str, Accumulator],
    *,
    learning_rate: float,
) -> dict[str, int]:
    """Fine-tune the weights over the data, add |change| to the accumulators, and undo it.

    AdamW, whose steps are taken as soon as a gradient is there, in training mode. The source names neither optimizer
    nor learning rate.

    Args:
        model: left as it was, bit for bit, whatever happens.
        weights: to be scored, by module path.
        others: trained along (biases, the head).
        data: the batches.
        loss: of a batch.
        accumulators: by module path.
        learning_rate: of AdamW.

    Returns:
        The numbers of `batches` and `examples`.

    Raises:
        ValueError, TypeError: as `accumulate_gradients`; ValueError too if a change is not finite.
    """
    parameters = {path: weight.parameter for path, weight in weights.items()} | distinct(others)
    moved: set[str] = set()
    with (
        undisturbed(model, gradients=True, training=True),
        checkpointed(model),
        on_trial(parameters, learning_rate) as trials,
    ):

        def receive(name: str, gradient: Tensor) -> None:
            trials[name].step(gradient)
            moved.add(name)

        with gradients_handed_over(model, parameters, receive):
            run_backward(model, data, loss)
        hand_in(((path, trials[path].change()) for path in weights if path in moved), weights, accumulators)
    return dict(data.counts)
