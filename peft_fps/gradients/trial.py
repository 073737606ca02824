"""Short training of parameters that is undone."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from peft_fps.gradients.accumulate import Accumulator
from peft_fps.gradients.backward_pass import Weight


class Trial:
    """A parameter that computes with a trained copy. The training does not write to the parameter's own memory.

    Attributes:
        parameter: the parameter.
        original: its data before the training.
        trained: the trained copy, in float32 or float64, so that rounding does not lose small steps.

    Args:
        parameter: parameter of any floating dtype.
        learning_rate: learning rate of AdamW, which has no weight decay here.
    """

    def __init__(self, parameter: nn.Parameter, learning_rate: float) -> None:
        self.parameter = parameter
        self.original = parameter.data
        self.trained = self.original.to(torch.promote_types(self.original.dtype, torch.float32), copy=True)
        self.trained.requires_grad_(True)
        self._optimizer = torch.optim.AdamW([self.trained], lr=learning_rate, weight_decay=0.0, foreach=False)
        self.show()

    def step(self, gradient: Tensor) -> None:
        """Take one step of AdamW. `gradient` has the shape of the parameter."""
        self.trained.grad = gradient.to(self.trained.dtype)
        self._optimizer.step()
        self.trained.grad = None
        self.show()

    def show(self) -> None:
        """Set the parameter's data to the trained copy, in the parameter's dtype."""
        self.parameter.data = self.trained.detach().to(self.original.dtype)

    def change(self) -> Tensor:
        """Return the absolute change since the start, in the parameter's shape and float32 or float64."""
        return (self.trained.detach() - self.original.to(self.trained.dtype)).abs()


@contextmanager
def on_trial(parameters: Mapping[str, nn.Parameter], learning_rate: float) -> Iterator[dict[str, Trial]]:
    """Make trials of parameters for the block. Afterwards each parameter has its original memory, bit for bit.

    Args:
        parameters: parameters by any name.
        learning_rate: learning rate of AdamW.

    Yields:
        Trials by the names of the parameters.
    """
    originals = [(parameter, parameter.data) for parameter in parameters.values()]
    try:
        yield {name: Trial(parameter, learning_rate) for name, parameter in parameters.items()}
    finally:
        for parameter, original in originals:
            parameter.data = original


def distinct(parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Return each parameter once, under the first of its names, because modules that share one must train it once."""
    names: dict[int, str] = {}
    for name, parameter in parameters.items():
        names.setdefault(id(parameter), name)
    return {name: parameters[name] for name in names.values()}


def hand_in(
    changes: Iterable[tuple[str, Tensor]], weights: Mapping[str, Weight], accumulators: Mapping[str, Accumulator]
) -> None:
    """Add the changes of a short training to the accumulators.

    Args:
        changes: module path and absolute change in the shape of the parameter, of each weight. An iterator avoids
            having all changes in memory at once.
        weights: weights to score by module path.
        accumulators: sums by module path.

    Raises:
        ValueError: a change is NaN or infinite. If the last step causes it, no loss shows it.
    """
    for path, change in changes:
        accumulators[path].add(weights[path].as_matrix(change))
        if not accumulators[path].is_finite():
            raise ValueError(
                f"{path}: the changes of its weight hold NaN or infinity after the short training, expected finite "
                "ones. Lower selection_learning_rate, check the data, or run the model in a wider dtype (float32). "
                "Nothing was changed."
            )
