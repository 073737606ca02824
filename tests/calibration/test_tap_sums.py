"""Sums over the inputs of convolutions, against the products that one weight after the other takes part in."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from peft_fps.calibration import Collector, Observed
from peft_fps.calibration.tap_sums import convolution_sums
from tests.support.helpers import normal


KINDS: dict[tuple[int, bool], Any] = {
    (1, False): nn.Conv1d,
    (2, False): nn.Conv2d,
    (3, False): nn.Conv3d,
    (1, True): nn.ConvTranspose1d,
    (2, True): nn.ConvTranspose2d,
    (3, True): nn.ConvTranspose3d,
}


def naive_sums(convolution: Any, x: Tensor, norm: str, **options: Any) -> tuple[Tensor, int]:
    """By groups and inputs: with a single weight of 1, the output holds what this weight multiplies, once each."""
    alone = type(convolution)(
        convolution.in_channels,
        convolution.out_channels,
        convolution.kernel_size,
        convolution.stride,
        convolution.padding,
        groups=convolution.groups,
        dilation=convolution.dilation,
        bias=False,
        padding_mode=convolution.padding_mode,
        dtype=torch.float64,
        **({"output_padding": convolution.output_padding} if convolution.transposed else {}),
    )
    neurons, groups, taps = convolution.out_channels, convolution.groups, convolution.weight.shape[2:].numel()
    result = torch.zeros(groups, convolution.in_channels // groups * taps, dtype=torch.float64)
    positions = 0
    for group in range(groups):
        neuron = group * (neurons // groups)
        for column in range(result.shape[1]):
            channel, tap = divmod(column, taps)
            with torch.no_grad():
                alone.weight.zero_()
                if convolution.transposed:
                    alone.weight[group * (convolution.in_channels // groups) + channel, 0].view(-1)[tap] = 1
                else:
                    alone.weight[neuron, channel].view(-1)[tap] = 1
                output = alone(x.double(), **options)[:, neuron]
            result[group, column] = {"l1": output.abs(), "l2": output.square(), "signed": output}[norm].sum()
            positions = output.numel()
    return result, x.shape[0] * x.shape[2:].numel() if convolution.transposed else positions


@st.composite
def convolutions(draw: st.DrawFn) -> Any:
    dimensions, transposed = draw(st.sampled_from(list(KINDS)))
    groups, inputs, outputs = draw(st.sampled_from([(1, 2, 3), (2, 4, 4), (3, 3, 6)]))
    options: dict[str, Any] = {
        name: tuple(draw(st.integers(low, high)) for _ in range(dimensions))
        for name, low, high in (("kernel_size", 1, 3), ("stride", 1, 3), ("padding", 0, 2), ("dilation", 1, 2))
    }
    if transposed:
        largest = [max(pair) - 1 for pair in zip(options["stride"], options["dilation"], strict=True)]
        options["output_padding"] = tuple(draw(st.integers(0, most)) for most in largest)
    else:
        options["padding_mode"] = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
        if draw(st.booleans()):
            options |= {"padding": draw(st.sampled_from(["same", "valid"])), "stride": 1}
    return KINDS[dimensions, transposed](inputs, outputs, groups=groups, **options)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@settings(max_examples=50)
@given(convolutions(), st.sampled_from(["l1", "l2", "signed"]), st.sampled_from([torch.float32, torch.bfloat16]))
def test_every_convolution(convolution: Any, norm: str, dtype: torch.dtype):
    x = normal(2, convolution.in_channels, *(5, 6, 5)[: len(convolution.kernel_size)]).to(dtype)
    sums, positions = convolution_sums(x, convolution, norm)
    expected, count = naive_sums(convolution, x, norm)
    assert sums.dtype == torch.float64
    assert positions == count
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-5 if norm == "signed" else 1e-9)  # may cancel
    alone, _ = convolution_sums(x[0], convolution, norm)
    torch.testing.assert_close(alone, convolution_sums(x[:1], convolution, norm)[0], rtol=0, atol=0)


def test_channels_last_and_strided_images():
    for convolution in (nn.Conv2d(4, 2, 3, stride=2, padding=1), nn.ConvTranspose2d(4, 2, 3, stride=2, padding=1)):
        for x in (normal(2, 4, 6, 6).to(memory_format=torch.channels_last), normal(2, 4, 6, 12)[..., ::2]):
            sums, _ = convolution_sums(x, convolution, "l1")
            torch.testing.assert_close(sums, naive_sums(convolution, x, "l1")[0], rtol=1e-5, atol=0)


def test_without_padding_all_taps_of_a_transposed_convolution_are_alike():
    x = normal(2, 3, 7)
    sums, positions = convolution_sums(x, nn.ConvTranspose1d(3, 5, 4, stride=2), "l1")
    expected = x.double().abs().sum((0, 2)).repeat_interleave(4)[None]
    assert positions == 14
    torch.testing.assert_close(sums, expected)


MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])


def test_a_convolution_over_padded_sequences_leaves_out_outputs_at_padding():
    convolution, x = nn.Conv1d(2, 4, 3, padding=1), normal(2, 2, 5)
    expected = torch.zeros(2, 3, dtype=torch.float64)
    for example, length in enumerate((3, 4)):
        for position in range(length):
            for tap in range(3):
                read = position + tap - 1
                if 0 <= read < 5:
                    expected[:, tap] += x[example, :, read].abs()
    sums, positions = convolution_sums(x, convolution, "l1", MASK)
    assert positions == 7
    torch.testing.assert_close(sums, expected.reshape(1, 6))


def test_a_transposed_convolution_over_padded_sequences_leaves_out_inputs_at_padding():
    x = normal(2, 2, 5)
    x[0, :, 3:], x[1, :, 4:] = torch.nan, torch.inf
    sums, positions = convolution_sums(x, nn.ConvTranspose1d(2, 4, 2), "l2", MASK)
    expected = (x[0, :, :3].double().square().sum(1) + x[1, :, :4].double().square().sum(1)).repeat_interleave(2)
    assert positions == 7
    torch.testing.assert_close(sums[0], expected)


def test_a_mask_of_another_length_is_no_mask():
    x, convolution = normal(2, 2, 5), nn.Conv1d(2, 4, 2, stride=2)
    left, right = (convolution_sums(x, convolution, "l1", mask) for mask in (MASK, None))
    assert torch.equal(left[0], right[0])
    assert left[1] == right[1] == 4


def test_the_mask_of_a_batch_reaches_convolutions_of_sequences():
    base, x = nn.Conv1d(2, 4, 1), normal(2, 2, 5)
    found = Collector({"layer": Observed(base, base, 1, 2)}, "l1")
    with torch.no_grad(), found:
        found.start_batch({"x": x, "attention_mask": MASK})
        base(x)
    assert found.statistics["layer"].positions == 7
    torch.testing.assert_close(found.statistics["layer"].sums, convolution_sums(x, base, "l1", MASK)[0])


def test_the_output_size_of_a_call_counts():
    """With a stride of 3, the padding cuts off the last tap of the last position, if the output is not asked for."""
    base = nn.ConvTranspose1d(2, 3, 3, stride=3, padding=1)
    x = normal(1, 2, 4)
    for size in (10, 12):
        found = Collector({"layer": Observed(base, base, 1, 6, own_forward=True)}, "l1")
        with torch.no_grad(), found:
            found.start_batch({"x": x})
            assert base(x, output_size=[size]).shape[-1] == size
        expected, count = naive_sums(base, x, "l1", output_size=[size])
        assert found.statistics["layer"].positions == count
        torch.testing.assert_close(found.statistics["layer"].sums, expected)
    assert not base._forward_pre_hooks
