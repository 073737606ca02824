"""Changes of weights in a short full fine-tuning (FAR, Vucetic et al. 2022, arXiv 2205.01541)."""

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
    """Fine-tune the weights over the data, add their absolute changes to the accumulators, and undo the training.

    The model is in training mode. AdamW takes the step of a parameter as soon as its gradient is complete. The paper
    names neither optimizer nor learning rate.

    Args:
        model: model to train. It is unchanged afterwards, bit for bit, after an error too.
        weights: weights to score by module path.
        others: parameters to train too (biases, the head).
        data: the batches.
        loss: mean loss of a batch.
        accumulators: sums by module path.
        learning_rate: learning rate of AdamW.

    Returns:
        The numbers of `batches` and `examples`.

    Raises:
        ValueError: there is no data, or a loss or a change is not finite.
        TypeError: the data or the loss is of an unknown kind.
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
