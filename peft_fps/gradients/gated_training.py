"""Which changes survive an L0 penalty on their number (DiffPruning, Guo et al. 2021, arXiv 2012.07463)."""

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
"""Of the gates' logits, constant, as in DiffPruning's code."""
SHUT = 1e-6
"""What a shut gate counts, times its probability to be open; see `GatedChange.size`."""


class GatedChange:
    """A change of one weight, gated entry by entry and as a whole: δ = change · gate · gate of the weight.

    Args:
        weight: sets shape and device.
        learning_rate: of the change.
        penalty: weight λ of the expected number of open gates.
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
        """Draw gates and return δ, in the weight's shape."""
        # the graph is built in `step`, one weight at a time, since it takes several times the weight's memory
        self._noise = torch.rand_like(self.change), torch.rand_like(self.whole_logit)
        return self._gated(*self._noise)

    def step(self, gradient: Tensor) -> None:
        """Take one step along the gradient of the loss with respect to the δ last sampled, and of the penalty."""
        assert self._noise is not None
        with torch.enable_grad():
            torch.autograd.backward(self._gated(*self._noise), gradient.float())
            (self._penalty * (open_probability(self.logit).sum() + open_probability(self.whole_logit))).backward()
        self._noise = None
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _gated(self, noise: Tensor, whole_noise: Tensor) -> Tensor:
        return self.change * sample_gate(self.logit, noise) * sample_gate(self.whole_logit, whole_noise)

    @torch.no_grad()
    def size(self) -> Tensor:
        """Return |δ| with typical gates, in the weight's shape.

        Changes behind shut gates, all 0 in the source, come after all others and keep an order: where fewer gates are
        open than entries are to be selected, the remaining ones would be the first of the weight.
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
    """Learn gated changes over the data, add |δ| to the accumulators, and undo everything.

    As DiffPruning's first phase, but |δ| is taken with typical gates where its code takes the last sampled ones, and
    gradients are not clipped, since none is held until all are there.

    Args:
        model: left as it was, bit for bit, whatever happens.
        weights: to be scored, by module path.
        others: trained along without gates (biases, the head).
        data: the batches.
        loss: of a batch.
        accumulators: by module path.
        learning_rate: of the changes and of the others.
        penalty: weight λ of the expected number of open gates.

    Returns:
        The numbers of `batches` and `examples`.

    Raises:
        ValueError, TypeError: as `accumulate_gradients`; ValueError too if a change is not finite.
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
