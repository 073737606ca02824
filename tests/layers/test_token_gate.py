"""The gate of TS-PEFT: where a change counts, how its threshold is learned, and what an adapter with gates can do."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_fps import hotswap_adapter
from peft_fps.layers.token_gate import LARGEST, passing, relative_magnitude
from tests.support.helpers import config, dense_change, images, normal, tiny_mlp, tiny_vit, weighted_of


# --- the maths ------------------------------------------------------------------------------------------------------


def test_the_relative_magnitude_is_a_quotient_of_lengths() -> None:
    change, base = normal(2, 3, 4), normal(2, 3, 4, seed=1)
    found = relative_magnitude(change, base, -1)
    assert found.shape == (2, 3, 1)
    for image in range(2):
        for token in range(3):
            long, short = (sum(float(v) ** 2 for v in x[image, token]) ** 0.5 for x in (change, base))
            assert found[image, token, 0] == pytest.approx(long / short, rel=1e-5)


def test_a_base_of_zero_gives_no_nan() -> None:
    change = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    assert relative_magnitude(change, torch.zeros(2, 2), -1).flatten().tolist() == [LARGEST, 0.0]


def test_a_threshold_of_zero_lets_all_pass() -> None:
    assert passing(torch.tensor([0.0, 0.1]), torch.zeros(1), 0.0).tolist() == [1.0, 1.0]


def test_the_gradients_are_those_of_a_boxcar_and_of_the_sparsity_term() -> None:
    magnitude = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.9], requires_grad=True)
    threshold = torch.tensor([0.15], requires_grad=True)
    upstream = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    found = passing(magnitude, threshold, 0.5)
    assert found.tolist() == [0.0, 0.0, 1.0, 1.0, 1.0]
    found.backward(upstream)
    near = [1 if abs(r - 0.15) < 0.3 else 0 for r in (0.0, 0.1, 0.2, 0.3, 0.9)]  # the mean of r is 0.3
    expected = -sum(u * n / 2 for u, n in zip(upstream.tolist(), near, strict=True)) - 0.5 * sum(near) / 2 / 5
    assert threshold.grad is not None
    assert float(threshold.grad) == pytest.approx(expected, rel=1e-5)
    assert magnitude.grad is None


# --- in a layer -----------------------------------------------------------------------------------------------------


def gated(base: nn.Module, threshold: float = 0.0, **options: Any) -> PeftModel:
    model = get_peft_model(base, config(**{"token_gate": "threshold"} | options))
    fill_values(model, threshold)
    return model.eval()


def fill_values(model: nn.Module, threshold: float) -> None:
    for seed, layer in enumerate(weighted_of(model).values()):
        for held in (layer.fps_values, layer.fps_bias):
            for parameter in held.values():
                parameter.data = normal(parameter.numel(), seed=seed) * 0.1
        for parameter in (layer.fps_threshold or {}).values():
            parameter.data.fill_(threshold)


def naive(layer: Any, x: Tensor, threshold: float) -> tuple[Tensor, list[float], list[float]]:
    """Output of a linear layer token by token, with the relative magnitudes and which of them pass."""
    weight, bias = layer.base_layer.weight, layer.base_layer.bias
    rows, magnitudes, passes = [], [], []
    for token in x.reshape(-1, x.shape[-1]):
        product = weight @ token
        change = dense_change(layer).float() @ token + layer.fps_bias["default"]
        magnitudes.append(float((change.norm() / product.norm()).detach()))
        passes.append(1.0 if magnitudes[-1] >= threshold else 0.0)
        rows.append(product + bias + passes[-1] * change)
    return torch.stack(rows).view(*x.shape[:-1], -1), magnitudes, passes


@pytest.mark.parametrize("threshold", [0.0, 0.35, 100.0])
def test_a_linear_layer_adds_its_change_where_it_is_large(threshold: float) -> None:
    model, x = gated(tiny_mlp(), threshold), normal(4, 5, 10)
    layer = model.base_model.model.first
    wanted, magnitudes, passes = naive(layer, x, threshold)
    torch.testing.assert_close(layer(x), wanted)
    assert threshold != 0.35 or 0 < sum(passes) < len(passes)
    direction = normal(4, 5, 12, seed=3)
    model.train()
    (layer(x) * direction).sum().backward()
    near = [abs(r - threshold) < sum(magnitudes) / len(magnitudes) for r in magnitudes]
    change = x.reshape(-1, 10) @ dense_change(layer).float().T + layer.fps_bias["default"]
    dots = (change * direction.reshape(-1, 12)).sum(1)
    of_task = -sum(float(dot.detach()) / 2 for dot, close in zip(dots, near, strict=True) if close)
    expected = of_task - 1e-3 * sum(near) / 2 / len(near)
    assert float(layer.fps_threshold["default"].grad) == pytest.approx(expected, rel=1e-3, abs=1e-6)
    mask = torch.tensor(passes)[:, None]
    torch.testing.assert_close(layer.fps_bias["default"].grad, (direction.reshape(-1, 12) * mask).sum(0))
    of_weight = (direction.reshape(-1, 12) * mask).T @ x.reshape(-1, 10)
    rows = torch.repeat_interleave(torch.arange(12), layer.fps_row_counts["default"].long())
    torch.testing.assert_close(layer.fps_values["default"].grad, of_weight[rows, layer.fps_columns["default"].long()])


def test_the_positions_of_a_convolution_are_those_of_its_map() -> None:
    model, x = gated(tiny_vit()), images()
    layer = model.base_model.model.vit.embeddings.patch_embeddings.projection
    plain = layer.base_layer(x)
    weight = dense_change(layer).float().view_as(layer.base_layer.weight)
    change = nn.functional.conv2d(x, weight, layer.fps_bias["default"], stride=4)
    product = plain - layer.base_layer.bias[:, None, None]
    magnitude = change.norm(dim=1, keepdim=True) / product.norm(dim=1, keepdim=True)
    middle = float((magnitude.detach().median() + magnitude.detach().max()) / 2)
    layer.fps_threshold["default"].data.fill_(middle)
    counts = magnitude >= middle
    assert 0 < int(counts.sum()) < counts.numel()
    torch.testing.assert_close(layer(x), plain + counts * change, rtol=1e-4, atol=1e-5)


def test_a_fresh_gate_is_open_and_an_adapter_without_one_has_none() -> None:
    fresh = get_peft_model(tiny_mlp(), config(token_gate="threshold"))
    assert {float(layer.fps_threshold["default"].detach()) for layer in weighted_of(fresh).values()} == {0.0}
    plain = get_peft_model(tiny_mlp(), config())
    assert all(layer.fps_threshold is None for layer in weighted_of(plain).values())
    assert not any("fps_threshold" in name for name, _ in plain.named_parameters())
    x = normal(3, 10)
    opened = gated(tiny_mlp(), 0.0)
    fill_values(plain, 0.0)
    torch.testing.assert_close(opened(x), plain(x))


def test_thresholds_train_with_the_values() -> None:
    model, x = gated(tiny_mlp(), 0.0, token_gate_penalty=1.0).train(), normal(16, 10)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.2)
    for _ in range(4):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert all(float(layer.fps_threshold["default"].detach()) > 0.1 for layer in weighted_of(model).values())
    report = model.selection_report(probe=[x])
    assert min(layer.passing for layer in report.layers if layer.passing is not None) < 1


# --- an adapter's life ----------------------------------------------------------------------------------------------


def test_saving_and_loading(tmp_path: Path) -> None:
    model, x = gated(tiny_mlp(), 0.35), normal(6, 10)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_mlp(), str(tmp_path)).eval()
    assert torch.equal(loaded(x), model(x))
    other = gated(tiny_mlp(), 0.1)
    hotswap_adapter(other, str(tmp_path), "default")
    assert torch.equal(other(x), model(x))
    plain = get_peft_model(tiny_mlp(), config())
    with pytest.raises(ValueError, match="The saved adapter has token_gate='threshold', expected None"):
        hotswap_adapter(plain, str(tmp_path), "default")


def test_a_file_without_thresholds_is_refused(tmp_path: Path) -> None:
    get_peft_model(tiny_mlp(), config()).save_pretrained(str(tmp_path))
    model = gated(tiny_mlp())
    with pytest.raises(ValueError, match="first: the adapter file holds .*, expected .*'fps_threshold'"):
        model.load_adapter(str(tmp_path), "default")


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (lambda model: model.merge_and_unload(), " .* depends on the input"),
        (lambda model: model.merge_adapter(), " .* depends on the input"),
        (lambda model: model.base_model.model.first.merge(), " .* depends on the input"),
        (
            lambda model: model.base_model.add_weighted_adapter(["default"], [1.0], "sum"),
            " .* a sum of changes cannot say",
        ),
    ],
    ids=["merge-and-unload", "merge-adapter", "merge-layer", "sum"],
)
def test_merging_and_summing_are_refused_with_the_reason(act: Any, reason: str) -> None:
    model, x = gated(tiny_mlp(), 0.35), normal(3, 10)
    before = model(x)
    with pytest.raises(ValueError, match=f"first: adapter 'default' has a gate{reason}"):
        act(model)
    assert torch.equal(model(x), before)


def test_a_layer_with_a_forward_of_its_own_is_refused() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    base = tiny_mlp()
    base.first = Doubled(10, 12)
    with pytest.raises(
        ValueError, match=r"first \(has a forward of its own\): expected plain layers.*exclude_modules=\['first'\]"
    ):
        gated(base, target_modules=["first"])


def test_adapters_with_and_without_gates_add_up() -> None:
    model, x = gated(tiny_mlp(), 0.35), normal(5, 10)
    model.add_adapter("open", config())
    layer = model.base_model.model.first
    layer.fps_values["open"].data = normal(layer.fps_values["open"].numel(), seed=9)
    wanted, _, _ = naive(layer, x, 0.35)
    layer.set_adapter(["default", "open"])
    torch.testing.assert_close(layer(x), wanted + x @ dense_change(layer, "open").float().T + layer.fps_bias["open"])


# --- the probe ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", [None, "threshold"])
def test_the_probe_measures_every_module_and_changes_nothing(gate: Any) -> None:
    model, x = gated(tiny_mlp(), 0.35, token_gate=gate, target_modules=["first", "last"]), normal(7, 10)
    _, magnitudes, passes = naive(model.base_model.model.first, x, 0.35)
    before = copy.deepcopy(model.state_dict())
    report = model.selection_report(probe=[x[:4], x[4:]])
    first = report.layers[0]
    assert first.relative_change == pytest.approx(sum(magnitudes) / 7, rel=1e-4)
    assert first.passing == pytest.approx(sum(passes) / 7 if gate else 1.0)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not model.base_model.model.first._forward_hooks
    assert str(report).splitlines()[0].split()[-2:] == ["change", "passing"]
    plain = model.selection_report()
    assert plain.layers[0].relative_change is None
    assert "passing" not in str(plain)
