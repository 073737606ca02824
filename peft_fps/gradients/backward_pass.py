"""Backward passes over data that sum up functions of gradients, with one gradient in memory at a time."""

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import send_to_device
from torch import Tensor, nn

from peft_fps.calibration import Pass, device_of, is_distributed, single_examples, undisturbed
from peft_fps.calibration.batches import count_examples
from peft_fps.gradients.accumulate import Accumulator, Exact
from peft_fps.gradients.hooks import checkpointed, gradients_handed_over
from peft_fps.gradients.losses import check_loss


BatchLoss = Callable[[nn.Module, Any], Tensor]
"""Takes the model and a batch on its device. Returns a scalar."""


@dataclass(frozen=True)
class Weight:
    """A weight to score.

    Attributes:
        parameter: the stored weight: `(neurons, inputs)`, `(inputs, neurons)` if `transposed`, or a convolution's
            `(neurons, channels / groups, kernel height, kernel width)`.
        transposed: whether the weight is stored as `(inputs, neurons)`. Default: False.
        stacked: whether the first dimension counts matrices of such a form. Default: False.
    """

    parameter: nn.Parameter
    transposed: bool = False
    stacked: bool = False

    def as_matrix(self, stored: Tensor) -> Tensor:
        """Return a tensor of the weight's stored shape as a matrix, `(neurons, inputs)` float32."""
        matrix = stored.transpose(-2, -1) if self.transposed else stored
        return (matrix.flatten(0, 1) if self.stacked else matrix.flatten(1)).float()


def accumulate_gradients(
    model: nn.Module,
    weights: Mapping[str, Weight],
    data: Pass,
    loss: BatchLoss,
    accumulators: Mapping[str, Accumulator],
    *,
    term: Callable[[str, Tensor], Tensor],
    per_example: bool = False,
    training: bool = False,
) -> dict[str, int]:
    """Add a function of the gradients of every batch to the accumulators.

    Under torch.distributed each process has its own data, which may be empty. All processes get the sums over all.

    Args:
        model: model that runs on every batch. It is unchanged afterwards, after an error too.
        weights: weights to score by module path. No other parameter gets a gradient.
        data: the batches.
        loss: mean loss of a batch.
        accumulators: sums by module path.
        term: takes a module path and a gradient `(neurons, inputs)` float32. Returns the term to add, of this shape.
        per_example: run a pass for each example of a batch instead of one for the batch. Default: False.
        training: training mode (dropout active) instead of evaluation mode. Default: False.

    Returns:
        The numbers of `batches` and `examples`.

    Raises:
        ValueError: there is no data, or a loss or a gradient is not finite.
        TypeError: the data or the loss is of an unknown kind.
    """

    def receive(path: str, gradient: Tensor) -> None:
        accumulators[path].add(term(path, weights[path].as_matrix(gradient)))

    parameters = {path: weight.parameter for path, weight in weights.items()}
    with (
        undisturbed(model, gradients=True, training=training),
        checkpointed(model),
        gradients_handed_over(model, parameters, receive),
    ):
        data.start(device_of(model))
        run_backward(model, data, loss, per_example=per_example)
        counts = data.finish(device_of(model))
        if is_distributed():
            _sum_over_processes(weights, accumulators)
    for path, accumulator in accumulators.items():
        if not accumulator.is_finite():
            raise ValueError(
                f"{path}: the gradients of its weight hold NaN or infinity, expected finite ones. Check the data, or "
                "run the model in a wider dtype (float32). Nothing was changed."
            )
    return counts


def run_backward(
    model: nn.Module,
    data: Pass,
    loss: BatchLoss,
    *,
    per_example: bool = False,
    prepare: Callable[[], None] = lambda: None,
) -> None:
    """Run a forward and a backward pass for every batch, and count the examples in `data.counts`.

    Args:
        model: model that runs on every batch.
        data: the batches.
        loss: mean loss of a batch.
        per_example: run a pass for each example of a batch instead of one for the batch. Default: False.
        prepare: called before every batch.

    Raises:
        ValueError, TypeError: a loss is not fit for a backward pass; see `check_loss`.
    """
    device = device_of(model)
    with closing(iter(data)) as passing:
        for index, batch in passing:
            prepare()
            data.counts["examples"] += count_examples(batch)
            batch = send_to_device(batch, device)
            for part in single_examples(batch) if per_example else (batch,):
                check_loss(loss(model, part), index).backward()


def _sum_over_processes(weights: Mapping[str, Weight], accumulators: Mapping[str, Accumulator]) -> None:
    """Add up the sums of all processes.

    All weights take part, because each process may have reached other ones.

    Args:
        weights: all weights to score, the same in every process.
        accumulators: sums of this process by module path. They become the sums of all processes.
    """
    for path, accumulator in accumulators.items():
        assert isinstance(accumulator, Exact)
        parameter = weights[path].parameter
        reached = torch.tensor(int(accumulator.reached), device=parameter.device)
        dist.all_reduce(reached)
        if int(reached):
            if accumulator.total is None:
                accumulator.add(torch.zeros_like(weights[path].as_matrix(parameter.detach())))
            assert accumulator.total is not None
            total = accumulator.total.to(parameter.device)
            dist.all_reduce(total)
            accumulator.total.copy_(total)
