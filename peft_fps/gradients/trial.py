"""Train weights for a while and take everything back."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from peft_fps.gradients.accumulate import Accumulator
from peft_fps.gradients.backward_pass import Weight


class Trial:
    """A parameter on trial: it computes with a copy, which is trained, while its own numbers stay untouched.

    Args:
        parameter: of any floating dtype; trained in float32 at least, so that small steps are not rounded away.
        learning_rate: of AdamW, without weight decay.
    """

    def __init__(self, parameter: nn.Parameter, learning_rate: float) -> None:
        self.parameter = parameter
        self.original = parameter.data
        self.trained = self.original.to(torch.promote_types(self.original.dtype, torch.float32), copy=True)
        self.trained.requires_grad_(True)
        self._optimizer = torch.optim.AdamW([self.trained], lr=learning_rate, weight_decay=0.0, foreach=False)
        self.show()

    def step(self, gradient: Tensor) -> None:
        """Take one step along the gradient of the parameter."""
        self.trained.grad = gradient.to(self.trained.dtype)
        self._optimizer.step()
        self.trained.grad = None
        self.show()

    def show(self) -> None:
        """Let the parameter compute with the trained numbers."""
        self.parameter.data = self.trained.detach().to(self.original.dtype)

    def change(self) -> Tensor:
        """Return the absolute change so far, in the parameter's shape and float32 at least."""
        return (self.trained.detach() - self.original.to(self.trained.dtype)).abs()


@contextmanager
def on_trial(parameters: Mapping[str, nn.Parameter], learning_rate: float) -> Iterator[dict[str, Trial]]:
    """Put parameters on trial for the block; afterwards each holds the very memory it held before, never written to.

    Args:
        parameters: by any name.
        learning_rate: see `Trial`.
    """
    originals = [(parameter, parameter.data) for parameter in parameters.values()]
    try:
        yield {name: Trial(parameter, learning_rate) for name, parameter in parameters.items()}
    finally:
        for parameter, original in originals:
            parameter.data = original


def distinct(parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Return each parameter under the first of its names: modules may share one, which must be trained once."""
    names: dict[int, str] = {}
    for name, parameter in parameters.items():
        names.setdefault(id(parameter), name)
    return {name: parameters[name] for name in names.values()}


def hand_in(
    changes: Iterable[tuple[str, Tensor]], weights: Mapping[str, Weight], accumulators: Mapping[str, Accumulator]
) -> None:
    """Add what a short training changed to the accumulators.

    Args:
        changes: module path and change in the shape of the parameter; formed one by one, so that they need not be in
            memory together.
        weights: by module path.
        accumulators: by module path.

    Raises:
        ValueError: a change is NaN or infinite. No loss shows that if it comes with the last step.
    """
    for path, change in changes:
        accumulators[path].add(weights[path].as_matrix(change))
        if not accumulators[path].is_finite():
            raise ValueError(
                f"{path}: the changes of its weight hold NaN or infinity after the short training, expected finite "
                "ones. Lower selection_learning_rate, check the data, or run the model in a wider dtype (float32). "
                "Nothing was changed."
            )
