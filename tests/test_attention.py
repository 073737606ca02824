"""`nn.MultiheadAttention` carries sparse changes of its projections, its fused paths included."""

from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_fps import FPSConfig
from peft_fps.base.packed_weight import OpenedModule
from peft_fps.calibration import Observed, Pass, observe
from peft_fps.layers.packed_layer import PackedLayer
from tests.support.expert_models import packed_layers
from tests.support.helpers import adapted, bits, config, layers_of, normal, selected_columns, unchanged


PROJECTIONS = ["in_proj", "out_proj"]
TARGETS: dict[str, Any] = {"target_modules": PROJECTIONS, "exclude_modules": ["apart.out_proj"]}


class Encoder(nn.Module):
    """A layer of torch, whose fused path reads all weights past their modules, and a cross-attention."""

    def __init__(self, batch_first: bool = True, bias: bool = True) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first, bias=bias)
        self.cross = nn.MultiheadAttention(8, 2, batch_first=batch_first, bias=bias)
        self.apart = nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=batch_first)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        found = self.block(x)
        return self.cross(found, x, x * 2, need_weights=False)[0] + self.apart(x, x[..., :6], x[..., :6])[0]


def encoder(**options: Any) -> Encoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Encoder(**options)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.4)
    return model.eval()


def write(plain: nn.Module, model: nn.Module) -> dict[str, tuple[nn.Parameter, list[tuple[int, int]]]]:
    """Write changes into a plain copy, entry by entry; return the weights and the places of their entries by path."""
    found = {}
    parameters = dict(plain.named_parameters())
    for path, layer in packed_layers(model).items():
        weight = parameters[f"{path}_weight" if path.endswith("in_proj") else f"{path}.weight"]
        places = [(row, column) for row, columns in enumerate(selected_columns(layer)) for column in columns]
        with torch.no_grad():
            for place, value in zip(places, layer.fps_values["default"].tolist(), strict=True):
                weight[place] += value
            if "default" in layer.fps_bias:
                bias = parameters[f"{path}_bias" if path.endswith("in_proj") else f"{path}.bias"]
                bias += layer.fps_bias["default"]
        found[path] = weight, places
    return found


@pytest.mark.parametrize("options", [{}, {"batch_first": False}, {"bias": False}], ids=str)
def test_outputs_and_gradients_are_those_of_dense_weights(options: dict[str, Any]) -> None:
    model, plain, x = adapted(encoder(**options), **TARGETS), encoder(**options), normal(3, 5, 8)
    assert list(packed_layers(model)) == [
        f"{name}.{own}" for name in ("block.self_attn", "cross") for own in PROJECTIONS
    ]
    weights = write(plain, model)
    for gradients in (False, True):  # without, torch takes its fused paths where it can
        with torch.set_grad_enabled(gradients):
            torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)
    model(x).square().sum().backward()
    plain(x).square().sum().backward()
    for path, layer in packed_layers(model).items():
        weight, places = weights[path]
        assert weight.grad is not None
        expected = torch.stack([weight.grad[place] for place in places])
        torch.testing.assert_close(layer.fps_values["default"].grad, expected, rtol=1e-3, atol=1e-4)


def test_the_life_of_an_adapter(tmp_path: Path) -> None:
    base, x = encoder(), normal(3, 5, 8)
    before = {name: bits(parameter) for name, parameter in base.named_parameters()}
    with torch.no_grad():
        plain = base(x)
        with pytest.warns(UserWarning, match=r"apart\.out_proj"):
            model = adapted(base)
        changed = model(x)
        with model.disable_adapter():  # plain layers of torch may take a fused path, which rounds otherwise
            torch.testing.assert_close(model(x), plain)
        model.merge_adapter()
        assert torch.equal(model(x), changed)
        with model.disable_adapter():
            torch.testing.assert_close(model(x), plain)
        model.unmerge_adapter()
        assert torch.equal(model(x), changed)
        model.save_pretrained(str(tmp_path))
        loaded = PeftModel.from_pretrained(encoder(), str(tmp_path)).eval()
        assert torch.equal(loaded(x), changed)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(x), changed)
    assert [name for name, _ in merged.named_modules()] == [name for name, _ in encoder().named_modules()]
    assert {name: bits(parameter) for name, parameter in model.unload().named_parameters()} == before


@pytest.mark.parametrize("batch_first", [True, False])
def test_activations_are_those_of_each_projection(batch_first: bool) -> None:
    base, x = encoder(batch_first=batch_first), normal(3, 5, 8)
    model = get_peft_model(base, FPSConfig(per_neuron=1, target_modules=["cross.in_proj", "cross.out_proj"]))
    mask = torch.ones(3, 5, dtype=torch.long)
    mask[0, 2:] = 0
    fed = x if batch_first else x.transpose(0, 1)
    observed = {
        path: Observed(layer, layer.base_layer, layer.matrices, layer.shape.inputs)
        for path, layer in packed_layers(model).items()
    }
    with model.disable_adapter(), torch.no_grad():
        statistics, _ = observe(base, observed, "l1", Pass([{"x": fed, "attention_mask": mask}], progress=False))
        plain = encoder(batch_first=batch_first)
        query = plain.block(fed)
        heads, _ = plain.cross(query, fed, fed * 2)
        heads = torch.linalg.solve(plain.cross.out_proj.weight, (heads - plain.cross.out_proj.bias)[..., None])[..., 0]
    kept = mask.bool() if batch_first else mask.t().bool()
    for path, inputs in (("cross.in_proj", [query, fed, fed * 2]), ("cross.out_proj", [heads])):
        assert statistics[path].positions.tolist() == [int(mask.sum())] * len(inputs)  # type: ignore[union-attr]
        for matrix, found in enumerate(inputs):
            expected = found[kept].abs().sum(0)
            torch.testing.assert_close(statistics[path].sums[matrix].float(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*layers are left out")
@pytest.mark.parametrize("importance", ["activation", "gradient"])
def test_calibration_chooses_entries(importance: str) -> None:
    model = get_peft_model(encoder(), FPSConfig(per_neuron=1, importance=importance, **TARGETS))
    model.calibrate([normal(3, 5, 8)], progress=False, loss=lambda outputs, batch: outputs.square().sum())
    assert all(layer.fps_row_counts["default"].tolist() == [1] * layer.neurons for layer in layers_of(model).values())


def test_projections_of_a_forward_or_tensors_of_their_own_are_refused() -> None:
    base = encoder()
    with unchanged(base), pytest.raises(ValueError, match=r"apart\.out_proj is read by .* without calling it"):
        get_peft_model(base, config(target_modules=["apart.out_proj"]))
    with pytest.raises(
        ValueError, match=r"cross is a MultiheadAttention, .* Name its projections, in_proj and out_proj"
    ):
        get_peft_model(base, config(target_modules=["cross"]))
    with pytest.raises(ValueError, match=r"cross\.in_proj_weight: it belongs to a MultiheadAttention, whose in_proj"):
        get_peft_model(base, config(target_modules=[], target_parameters=["cross.in_proj_weight"]))
    assert not any(isinstance(module, OpenedModule) for module in base.modules())


def test_several_adapters() -> None:
    model, x = adapted(encoder(), **TARGETS), normal(3, 5, 8)
    first = deepcopy(model)(x)
    model.add_adapter("other", config(target_modules=["cross.out_proj", "linear1"], importance="random"))
    model.set_adapter("other")
    torch.testing.assert_close(model(x), encoder()(x))
    model.set_adapter("default")
    torch.testing.assert_close(model(x), first)
    kinds = {path: type(layer) for path, layer in layers_of(model).items()}
    assert kinds["cross.out_proj"] is PackedLayer
    assert set(model.base_model.targeted_module_names) == set(kinds)


def test_offloaded_attention_is_named_and_left_alone() -> None:
    base = encoder()
    vars(base.cross)["_hf_hook"] = SimpleNamespace(offload=True)
    with pytest.warns(
        UserWarning,
        match=r"2 of \d+ layers are left out .*: cross\.out_proj: read without being called by .* offloaded",
    ):
        model = adapted(base)
    assert {path.rpartition(".")[0] for path in packed_layers(model)} == {"block.self_attn"}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors_are_refused_in_calibration() -> None:
    """torch's encoder makes them of a padding mask, where gradients are off."""

    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 1)

        def forward(self, x: Tensor, pad: Tensor) -> Tensor:
            return self.encoder(x, src_key_padding_mask=pad)

    pad = torch.tensor([[False, False, True], [False, False, False]])
    model = get_peft_model(Nested().eval(), FPSConfig(budget=0.2, bias="none"))
    with pytest.raises(
        ValueError,
        match=r"layers.0.self_attn.*nested tensor, expected a dense one.*Encoder with",
    ):
        model.calibrate([{"x": torch.randn(2, 3, 8), "pad": pad}], progress=False)
