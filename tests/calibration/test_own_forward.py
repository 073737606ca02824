"""Statistics of what a layer with a forward of its own multiplies, against patches cut out one by one."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_fps.calibration import Collector, Observed
from tests.support.helpers import normal
from tests.support.own_forwards import Causal, Normalised, PadsFirst, Standardised, Trimmed


def observed(base: nn.Module, inputs: int, groups: int, x: Tensor, norm: str) -> Tensor:
    with torch.no_grad(), Collector({"layer": Observed(base, base, groups, inputs, own_forward=True)}, norm) as found:
        found.start_batch({"x": x})
        base(x)
        base(x + 1)
    return found.statistics["layer"].typical(norm)


def assert_typical(base: nn.Module, x: Tensor, columns: Tensor, norm: str = "l1") -> None:
    """`columns` holds what is multiplied of x and of x + 1, `(positions, groups, inputs)`."""
    _, groups, inputs = columns.shape
    columns = columns.double()
    expected = columns.abs().mean(0) if norm == "l1" else columns.square().mean(0).sqrt()
    torch.testing.assert_close(observed(base, inputs, groups, x, norm), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_a_convolution_that_pads_first(norm: str):
    base, x = PadsFirst(4, 6, (3, 2), stride=2, groups=2, bias=False), normal(2, 4, 5, 6)
    patches = []
    for image in torch.cat([x, x + 1]):
        padded = F.pad(image, (0, 1, 2, 1))
        for top in range(0, padded.shape[1] - 2, 2):
            for left in range(0, padded.shape[2] - 1, 2):
                patches.append(padded[:, top : top + 3, left : left + 2].reshape(2, -1))
    assert_typical(base, x, torch.stack(patches), norm)


def test_a_causal_convolution_of_sequences():
    base, x = Causal(4, 6, 3, dilation=2, groups=2), normal(2, 4, 7)
    patches = [
        torch.stack([F.pad(example, (4, 0))[:, last : last + 5 : 2] for last in range(7)])
        .unflatten(1, (2, 2))
        .flatten(2)
        for example in torch.cat([x, x + 1])
    ]
    assert_typical(base, x, torch.cat(patches))


def test_a_transposed_convolution_that_trims_its_output():
    base, x = Trimmed(4, 6, 4, stride=2), normal(2, 4, 7)
    columns = torch.cat([x, x + 1]).transpose(1, 2).flatten(0, 1)[:, None]
    assert_typical(base, x, columns.repeat_interleave(4, 2))


def test_a_convolution_that_standardises_its_weight_reads_its_input_as_it_is():
    base, x = Standardised(3, 5, 3, padding=1), normal(2, 3, 4, 4)
    assert_typical(base, x, F.unfold(torch.cat([x, x + 1]), 3, padding=1).transpose(1, 2).reshape(-1, 1, 27))


def test_a_linear_layer_that_normalises_its_input():
    base, x = Normalised(6, 5), normal(3, 6)
    assert_typical(base, x, F.normalize(torch.cat([x, x + 1]), dim=-1)[:, None])


def test_without_a_product_that_is_known_the_input_counts():
    class ByHand(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return (input[..., None, :] * self.weight).sum(-1)

    x = normal(3, 6)
    assert_typical(ByHand(6, 5), x, torch.cat([x, x + 1])[:, None])


def test_a_failing_forward_leaves_no_watch_behind():
    class Fails(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            raise RuntimeError("no")

    base = Fails(6, 5)
    with pytest.raises(RuntimeError, match="no"):
        observed(base, 6, 1, normal(3, 6), "l1")
    assert not base._forward_hooks
    assert not base._forward_pre_hooks
    assert torch.overrides._get_current_function_mode() is None


def test_an_embedding_that_derives_positions_looks_those_up():
    class Positions(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(torch.arange(input.shape[1]) + 2)

    found = observed(Positions(6, 3), 6, 1, torch.zeros(4, 3, dtype=torch.int64), "l1")
    assert found.tolist() == [[0, 0, 1 / 3, 1 / 3, 1 / 3, 0]]
