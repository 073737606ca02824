"""Hooks that gather statistics, on small modules of every kind."""

import gc
import weakref
from collections.abc import Iterable
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from peft_fps.calibration import Collector, InputStatistics, Observed, collect
from tests.support.helpers import images, normal, tiny_conv, tiny_mlp, tiny_vit


def observed(model: nn.Module) -> dict[str, Observed]:
    """All linear layers and convolutions of a plain model."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            found[name] = Observed(module, module, getattr(module, "groups", 1), module.weight[0].numel())
    return found


def collected(model: nn.Module, batches: Iterable[Any], norm: str = "l1") -> dict[str, InputStatistics]:
    with torch.no_grad(), Collector(observed(model), norm) as collector:
        for index, batch in enumerate(batches):
            collector.start_batch(batch)
            model(**batch) if isinstance(batch, dict) else model(batch)
            collector.check_batch(index)
    return collector.statistics


def assert_sums(found: InputStatistics, positions: Tensor, norm: str = "l1") -> None:
    """`positions` holds one row for every position that must have counted."""
    exact = positions.double().abs() if norm == "l1" else positions.double().square()
    assert found.positions == positions.shape[0]
    torch.testing.assert_close(found.sums, exact.sum(0)[None], rtol=1e-5, atol=1e-12)


@pytest.fixture
def reductions(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """The function that reduces an input, as it is, and watched."""
    watched = Mock(wraps=collect.column_sums)
    monkeypatch.setattr(collect, "column_sums", watched)
    return watched


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_sums_over_batches(norm: str):
    model = tiny_mlp()
    data = [normal(3, 5, 10, seed=i) for i in range(4)]
    found = collected(model, data, norm)
    inputs = torch.cat(data).reshape(-1, 10)
    assert list(found) == ["first", "last"]
    assert_sums(found["first"], inputs, norm)
    with torch.no_grad():
        assert_sums(found["last"], F.gelu(model.first(inputs)), norm)


def test_grouped_convolutions_have_sums_per_group():
    model, x = tiny_conv(), images(3)
    found = collected(model, [x])
    with torch.no_grad():
        patches = F.unfold(F.relu(model.stem(x)), 3, padding=1, stride=2)
    expected = patches.double().abs().unflatten(1, (4, -1)).sum((0, 3))
    assert found["grouped"].sums.shape == (4, 2 * 3 * 3)
    assert found["grouped"].positions == 3 * 8 * 8
    torch.testing.assert_close(found["grouped"].sums, expected, rtol=1e-5, atol=1e-9)


def test_a_convolution_of_a_single_image():
    model, x = nn.Sequential(nn.Conv2d(3, 2, 3)), images(1)
    single, batch = collected(model, [x[0]])["0"], collected(model, [x])["0"]
    assert torch.equal(single.sums, batch.sums)
    assert single.positions == batch.positions


def test_layers_that_read_one_tensor_share_its_reduction(reductions: Mock):
    model, read = tiny_vit(), []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _module, args: read.append(args[0]))
    with torch.no_grad():
        model(images())
    different = len({id(x) for x in read})
    assert len(read) == 2 * 6 + 1
    assert different == 2 * 4 + 1  # query, key and value together
    collected(model, [images(), images()])
    assert reductions.call_count == 2 * different


def test_a_tensor_that_was_overwritten_is_reduced_again(reductions: Mock):
    class Overwriting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            return self.a(x) + self.b(x.mul_(3))

    x = normal(5, 4)
    found = collected(Overwriting(), [x])
    assert reductions.call_count == 2
    assert_sums(found["a"], x)
    assert_sums(found["b"], 3 * x)


def test_a_tensor_at_the_address_of_a_former_one_is_reduced_again():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(20)))
    x = normal(5, 4)
    found = collected(model, [x] * 3)
    for i in range(20):
        with torch.no_grad():
            assert_sums(found[str(i)], torch.cat([model[:i](x)] * 3))


@given(st.permutations(range(7)), st.sets(st.integers(1, 6)).map(sorted))
def test_any_split_into_batches_in_any_order_gives_the_same(order: list[int], cuts: list[int]):
    x = normal(7, 3, 10)
    whole = collected(tiny_mlp(), [x])
    split = collected(tiny_mlp(), x[torch.tensor(order)].tensor_split(cuts))
    for name, found in split.items():
        assert found.positions == whole[name].positions
        torch.testing.assert_close(found.sums, whole[name].sums, rtol=1e-5, atol=0)


# --- what the input may look like -----------------------------------------------------------------------------------


def test_inputs_by_name_and_layers_that_are_called_twice():
    class ByName(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(input=self.layer(x))

    model, x = ByName(), normal(5, 4)
    with torch.no_grad():
        assert_sums(collected(model, [x])["layer"], torch.cat([x, model.layer(x)]))


def test_an_expert_without_tokens_is_skipped():
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle, self.never = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x).sum() + self.idle(x[:0]).sum()

    assert list(collected(Experts(), [normal(5, 4)])) == ["used"]


class Padded(nn.Module):
    """Reads its input as tokens, as a flat list of tokens, and pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.flat, self.pooled = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.tokens(x).sum() + self.flat(x.flatten(0, 1)).sum() + self.pooled(x[:, 0]).sum()


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32], ids=str)
def test_masks_apply_where_the_positions_are_those_of_the_mask(dtype: torch.dtype):
    x = normal(3, 5, 4)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    found = collected(Padded(), [{"x": x, "attention_mask": mask.to(dtype)}])
    assert_sums(found["tokens"], x[mask.bool()])
    assert_sums(found["flat"], x[mask.bool()])
    assert_sums(found["pooled"], x[:, 0])


def test_no_mask_and_masks_of_other_shapes():
    x = normal(3, 5, 4)
    for mask in (None, torch.zeros(3, 6), torch.zeros(3, 1, 5, 5)):
        found = collected(Padded(), [{"x": x, "attention_mask": mask}])
        assert_sums(found["tokens"], x.flatten(0, 1))
    assert_sums(collected(Padded(), [x])["flat"], x.flatten(0, 1))


def test_a_mask_counts_for_its_own_batch_only():
    x = normal(2, 5, 4)
    found = collected(Padded(), [{"x": x, "attention_mask": torch.zeros(2, 5)}, {"x": x}])
    assert_sums(found["tokens"], x.flatten(0, 1))


class EncoderDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"layer": nn.Linear(4, 4)})
        self.decoder = nn.ModuleDict({"layer": nn.Linear(4, 4), "cross": nn.Linear(4, 4)})

    def forward(self, x: Tensor, y: Tensor, attention_mask: Tensor, decoder_attention_mask: Tensor) -> Tensor:
        encoded = self.encoder["layer"](x)
        return self.decoder["layer"](y).sum() + self.decoder["cross"](encoded).sum()


@pytest.mark.parametrize("lengths", [(5, 3), (4, 4)], ids=["different-lengths", "equal-lengths"])
def test_encoder_and_decoder_have_masks_of_their_own(lengths: tuple[int, int]):
    model, (x, y) = EncoderDecoder(), (normal(2, length, 4, seed=length) for length in lengths)
    mask, decoder_mask = torch.ones(2, lengths[0]), torch.ones(2, lengths[1])
    mask[0, 2:], decoder_mask[1, 1:] = 0, 0
    batch = {"x": x, "y": y, "attention_mask": mask, "decoder_attention_mask": decoder_mask}
    found = collected(model, [batch])
    assert_sums(found["encoder.layer"], x[mask.bool()])
    assert_sums(found["decoder.layer"], y[decoder_mask.bool()])
    with torch.no_grad():  # cross attention reads what the encoder wrote
        assert_sums(found["decoder.cross"], model.encoder["layer"](x)[mask.bool()])


# --- what must not happen -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_an_input_that_is_not_finite_is_an_error_with_module_and_batch(value: float, norm: str):
    data = [normal(2, 10, seed=i) for i in range(3)]
    data[2][1, 4] = value
    with pytest.raises(ValueError, match=r"^first: .*NaN or infinity in calibration batch 2.*float32"):
        collected(tiny_mlp(), data, norm)


def test_the_first_module_of_the_run_is_named():
    model = tiny_mlp()
    with torch.no_grad():
        model.first.bias[3] = torch.inf
    with pytest.raises(ValueError, match=r"^last: "):
        collected(model, [normal(2, 10)])


@pytest.mark.parametrize("fails", [False, True])
def test_hooks_are_removed(fails: bool):
    model = tiny_mlp()

    def data() -> Iterable[Tensor]:
        yield normal(2, 10)
        if fails:
            raise OSError("disk")

    try:
        collected(model, data())
    except OSError:
        assert fails
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_no_activation_is_kept_alive():
    model = tiny_mlp()
    inputs: list[weakref.ref[Tensor]] = []
    for module in (model.first, model.last):
        module.register_forward_pre_hook(lambda _module, args: inputs.append(weakref.ref(args[0])))
    with torch.no_grad(), Collector(observed(model), "l1") as collector:
        x = normal(2, 10)
        collector.start_batch(x)
        model(x)
        del x
        gc.collect()
        assert len(inputs) == 2
        assert [reference() for reference in inputs] == [None, None]
        collector.check_batch(0)


def test_sums_require_no_gradient_and_are_wide():
    model = tiny_mlp().bfloat16()
    with Collector(observed(model), "l1") as collector:  # with gradients on
        collector.start_batch(None)
        model(normal(2, 10).bfloat16())
    assert all(found.sums.dtype == torch.float64 for found in collector.statistics.values())
    assert not any(found.sums.requires_grad for found in collector.statistics.values())
