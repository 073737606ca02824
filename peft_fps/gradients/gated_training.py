"""Training of changes of weights under an L0 penalty (DiffPruning, Guo et al. 2021, arXiv 2012.07463)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from peft_fps.calibration import Pass, undisturbed
from peft_fps.gradients.accumulate import Accumulator
from peft_fps.gradients.backward_pass import BatchLoss, Weight, run_backward
from peft_fps.gradients.gates import FIRST_LOGIT, open_probability, sample_gate, typical_gate
from peft_fps.gradients.hooks import checkpointed, gradients_handed_over
from peft_fps.gradients.trial import distinct, hand_in, on_trial


GATE_LEARNING_RATE = 0.1
"""Learning rate of the logits of gates. It is constant, as in DiffPruning's code."""
SHUT = 1e-6
"""Value of a shut gate with probability 1 to be open; see `GatedChange.size`."""


class GatedChange:
    """A trained change of one weight with a gate per element and a gate for all: δ = change · gate · common gate.

    Attributes:
        change: the change, in the weight's shape and float32.
        logit: logit α of each element's gate, in the weight's shape and float32.
        whole_logit: logit α of the common gate, a scalar.

    Args:
        weight: gives shape and device.
        learning_rate: learning rate of the change in AdamW.
        penalty: weight λ of the expected number of open gates in the loss.
    """

    def __init__(self, weight: Tensor, learning_rate: float, penalty: float) -> None:
        self.change = torch.zeros_like(weight, dtype=torch.float32).requires_grad_()
        self.logit = torch.full_like(self.change, FIRST_LOGIT).requires_grad_()
        self.whole_logit = torch.tensor(FIRST_LOGIT, dtype=torch.float32, device=weight.device).requires_grad_()
        self._penalty = penalty
        self._optimizer = torch.optim.AdamW(
            [
                {"params": [self.change], "lr": learning_rate},
                {"params": [self.logit, self.whole_logit], "lr": GATE_LEARNING_RATE},
            ],
            weight_decay=0.0,
            foreach=False,
        )
        self._noise: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def sample(self) -> Tensor:
        """Draw gates and return δ, in the weight's shape and float32."""
        # without a graph, which takes several times the weight's memory; `step` builds it for one weight at a time
        self._noise = torch.rand_like(self.change), torch.rand_like(self.whole_logit)
        return self._gated(*self._noise)

    def step(self, gradient: Tensor) -> None:
        """Take one step of AdamW on the loss and the penalty.

        Args:
            gradient: gradient of the loss with respect to the δ that `sample` returned last, in the weight's shape.
        """
        assert self._noise is not None
        with torch.enable_grad():
            torch.autograd.backward(self._gated(*self._noise), gradient.float())
            (self._penalty * (open_probability(self.logit).sum() + open_probability(self.whole_logit))).backward()
        self._noise = None
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _gated(self, noise: Tensor, whole_noise: Tensor) -> Tensor:
        """Return δ for uniform noise of each element's gate and of the common gate."""
        return self.change * sample_gate(self.logit, noise) * sample_gate(self.whole_logit, whole_noise)

    @torch.no_grad()
    def size(self) -> Tensor:
        """Return |δ| with gates without noise, in the weight's shape and float32.

        A shut gate counts `SHUT` times its probability to be open, where it counts 0 in the source. So changes behind
        shut gates rank after all others and differ among themselves. With 0, the first elements of a weight would fill
        up a selection that has more entries than gates are open.
        """
        gates = [torch.maximum(typical_gate(a), SHUT * open_probability(a)) for a in (self.logit, self.whole_logit)]
        return self.change.abs() * gates[0] * gates[1]


def accumulate_gated_changes(
    model: nn.Module,
    weights: Mapping[str, Weight],
    others: Mapping[str, nn.Parameter],
    data: Pass,
    loss: BatchLoss,
    accumulators: Mapping[str, Accumulator],
    *,
    learning_rate: float,
    penalty: float,
) -> dict[str, int]:
    """Train gated changes over the data, add |δ| to the accumulators, and undo the training.

    This is DiffPruning's first phase with two differences. |δ| has gates without noise, where DiffPruning's code takes
    the gates that it sampled last. Gradients are not clipped, because memory holds one gradient at a time.

    Args:
        model: model to train. It is unchanged afterwards, bit for bit, after an error too.
        weights: weights to score by module path.
        others: parameters to train too, without gates (biases, the head).
        data: the batches.
        loss: mean loss of a batch.
        accumulators: sums by module path.
        learning_rate: learning rate of the changes and of the other parameters in AdamW.
        penalty: weight λ of the expected number of open gates in the loss.

    Returns:
        The numbers of `batches` and `examples`.

    Raises:
        ValueError: there is no data, or a loss or a change is not finite.
        TypeError: the data or the loss is of an unknown kind.
    """
    parameters = {path: weight.parameter for path, weight in weights.items()}
    others = distinct(others)
    originals = {path: parameter.data for path, parameter in parameters.items()}
    gated = {path: GatedChange(original, learning_rate, penalty) for path, original in originals.items()}
    reached: set[str] = set()
    with (
        undisturbed(model, gradients=True, training=True),
        checkpointed(model),
        on_trial(others, learning_rate) as trials,
    ):

        def receive(name: str, gradient: Tensor) -> None:
            reached.add(name)
            (gated[name] if name in gated else trials[name]).step(gradient)

        def sample() -> None:
            for path, parameter in parameters.items():
                parameter.data = (originals[path] + gated[path].sample()).to(parameter.dtype)

        try:
            with gradients_handed_over(model, parameters | others, receive):
                run_backward(model, data, loss, prepare=sample)
        finally:
            for path, parameter in parameters.items():
                parameter.data = originals[path]
    hand_in(((path, gated[path].size()) for path in weights if path in reached), weights, accumulators)
    return dict(data.counts)
