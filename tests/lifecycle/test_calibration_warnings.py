"""Modules that calibration does not reach: their budget, saving and loading, switching back, and state dicts."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from peft_fps import FPSConfig, Selection, hotswap_adapter
from peft_fps.layers.entry_layer import EntryLayer
from tests.support.helpers import base_bytes, fill, layers_of, normal, unchanged


class Reads(nn.Module):
    """Calls `used` and `tail`; reads the weight of `past` without calling it; has an idle layer and an idle norm."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.past, self.idle = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 6)
        self.norm, self.spare, self.tail = nn.LayerNorm(8), nn.LayerNorm(8), nn.Linear(8, 4)
        self.everything = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.used(x).relu())
        x = self.past(x) if self.everything else x @ self.past.weight.t()
        if self.everything:
            return self.tail(self.spare(x)) + self.idle(x).sum()
        return self.tail(x)


OUT = {"past", "idle"}


def base() -> Reads:
    torch.manual_seed(0)
    return Reads().eval()


def calibrated(model: nn.Module, **options: Any) -> PeftModel:
    found = get_peft_model(model, FPSConfig(**({"budget": 0.3} | options)))
    with pytest.warns(UserWarning, match="will not be trained"):
        found.calibrate([normal(5, 8)], progress=False)
    return found.eval()


def trained(**options: Any) -> PeftModel:
    """Calibrated, with changes that are nowhere zero."""
    model = calibrated(base(), **options)
    fill(model)
    return model


def sizes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Entries and biases of each layer."""
    return {
        path: (
            layer.fps_values["default"].numel() if isinstance(layer, EntryLayer) else 0,
            layer.fps_bias["default"].numel() if "default" in layer.fps_bias else 0,
        )
        for path, layer in layers_of(model).items()
    }


@pytest.mark.parametrize("importance", ["activation", "gradient", "movement"])
def test_the_budget_goes_to_the_modules_that_were_reached(importance: str):
    loss = None if importance == "activation" else lambda output, batch: output.square().mean()
    model = get_peft_model(base(), FPSConfig(budget=0.3, importance=importance))
    planned = sizes(model)
    # `past` is not called, and its weight gets a gradient
    kind = "saw no input" if importance == "activation" else r"were not called \(.* read their .*\) or got no gradient"
    with pytest.warns(UserWarning, match=rf"2 of 4 modules {kind}.*not be trained: past, idle. Their part of the bud"):
        report = model.calibrate([normal(5, 8)], progress=False, loss=loss)
    found = sizes(model)
    assert all(found[path] == (0, 0) for path in OUT)
    limit = int(0.3 * report.base_parameters)
    assert limit - len(found) < report.trained <= limit
    assert found["used"][0] > planned["used"][0]
    assert report.unreached == ("past", "idle")
    assert "not reached by calibration, not trained: past, idle" in str(report)


def test_norms_that_are_not_called_hold_nothing():
    model = calibrated(base(), bias="with_norms")
    assert sizes(model)["spare"] == (0, 0)
    assert sizes(model)["norm"] == (0, 8)


def test_what_is_not_called_never_changes_what_merging_does():
    model = trained()
    x, before = normal(3, 8), base_bytes(model)
    expected = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)
    model.unmerge_adapter()
    assert base_bytes(model) == before
    torch.testing.assert_close(model.merge_and_unload(safe_merge=True)(x), expected)


def test_every_trained_parameter_gets_a_gradient():
    model = calibrated(base()).train()
    model(normal(3, 8)).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad and p.numel())


def test_patterns_of_modules_that_were_not_reached_do_not_matter():
    model = calibrated(base(), budget_pattern={"idle": 0.5, "tail": 0.25})
    assert sizes(model)["tail"] == (8, 4)
    assert sizes(model)["idle"] == (0, 0)


def test_per_neuron_keeps_its_numbers():
    model = get_peft_model(base(), FPSConfig(per_neuron=2))
    with pytest.warns(UserWarning, match="The others keep per_neuron"):
        model.calibrate([normal(5, 8)], progress=False)
    assert sizes(model)["used"] == (16, 8)


def test_saving_loading_and_resuming_into_an_adapter_that_was_not_calibrated(tmp_path: Path):
    model = trained()
    model.save_pretrained(tmp_path)
    x = normal(3, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = PeftModel.from_pretrained(base(), tmp_path).eval()
    assert set(layers_of(again)) == {"used", "tail"}
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)
    assert again.selection_report().unreached == ("past", "idle")
    assert Selection.of(again).modules == Selection.from_adapter(tmp_path).modules == Selection.of(model).modules
    fresh = get_peft_model(base(), FPSConfig(budget=0.3)).eval()
    with pytest.warns(UserWarning, match="holds nothing for 2 of 4 modules.*past, idle"):
        fresh.load_adapter(str(tmp_path), "default")
    assert sizes(fresh) == sizes(model)
    torch.testing.assert_close(fresh(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("budget", [share / 100 for share in range(28, 60, 2)])
@pytest.mark.parametrize("bias", ["all", "none"])
def test_resuming_whatever_whole_numbers_leave_of_the_budget(budget: float, bias: str):
    """After calibration, an adapter for fewer modules may have a few entries more than the one for all."""
    model = trained(budget=budget, bias=bias)
    state, fresh = get_peft_model_state_dict(model), get_peft_model(base(), FPSConfig(budget=budget, bias=bias)).eval()
    with pytest.warns(UserWarning, match="holds nothing for 2 of 4 modules.*past, idle"):
        set_peft_model_state_dict(fresh, state)
    assert sizes(fresh) == sizes(model)
    x = normal(3, 8)
    assert torch.equal(fresh(x), model(x))


@pytest.mark.parametrize("bias", ["all", "none", "with_norms"])
def test_an_adapter_that_left_modules_out_loads_one_that_did_not(bias: str):
    whole = get_peft_model(base(), FPSConfig(per_neuron=2, bias=bias)).eval()
    whole.base_model.model.everything = True
    whole.calibrate([normal(5, 8)], progress=False)
    fill(whole)
    model = calibrated(base(), budget=None, per_neuron=2, bias=bias)
    set_peft_model_state_dict(model, get_peft_model_state_dict(whole))
    model.base_model.model.everything = True
    assert sizes(model) == sizes(whole)
    assert torch.equal(model(normal(3, 8)), whole(normal(3, 8)))


def test_going_back_to_a_checkpoint_of_the_same_calibration():
    """As a Trainer does with `load_best_model_at_end`: of modules that were not reached nothing warns."""
    model = trained()
    x, state = normal(3, 8), {key: tensor.clone() for key, tensor in get_peft_model_state_dict(model).items()}
    expected, before = model(x), sizes(model)
    fill(model, seed=7)
    assert not torch.equal(model(x), expected)
    set_peft_model_state_dict(model, state)
    assert sizes(model) == before
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("kept", [(), ("fps_bias",)], ids=["nothing", "biases alone"])
def test_a_file_without_entries_is_refused(kept: tuple[str, ...]):
    model = get_peft_model(base(), FPSConfig(budget=0.3, importance="magnitude")).eval()
    state = {key: tensor for key, tensor in get_peft_model_state_dict(model).items() if key.endswith(kept or "!")}
    with (
        unchanged(model),
        pytest.raises(ValueError, match=r"^(used|past|idle|tail): the adapter file holds .*expected"),
    ):
        set_peft_model_state_dict(model, state)


def test_a_file_with_more_than_the_budget_is_refused(tmp_path: Path):
    model = trained(budget=0.6)
    model.save_pretrained(tmp_path)
    fresh = get_peft_model(base(), FPSConfig(budget=0.3)).eval()
    with unchanged(fresh), pytest.raises(ValueError, match=r"entries and biases in 2 of 4 modules, expected at most"):
        fresh.load_adapter(str(tmp_path), "default")


def test_a_later_calibration_that_reaches_them_gives_their_share_back():
    model = get_peft_model(base(), FPSConfig(budget=0.3))
    planned = sizes(model)
    with pytest.warns(UserWarning, match="will not be trained"):
        model.calibrate([normal(5, 8)], progress=False)
    model.base_model.model.everything = True
    report = model.calibrate([normal(5, 8)], progress=False)
    assert sizes(model) == planned
    assert report.unreached == ()
    assert all(bool(torch.isfinite(p).all()) for n, p in model.named_parameters() if "fps_" in n)


def test_no_module_reached_is_an_error():
    model = get_peft_model(base(), FPSConfig(budget=0.3, target_modules=["past", "idle"]))
    with unchanged(model), pytest.raises(ValueError, match=r"past: neither it nor any other of the 2 modules"):
        model.calibrate([normal(5, 8)], progress=False)


def test_selections_carry_over_what_was_not_reached():
    source, target = calibrated(base()), get_peft_model(base(), FPSConfig(budget=0.3))
    selection = Selection.of(source)
    selection.apply(target)
    assert sizes(target) == sizes(source)
    assert Selection.of(target).modules == selection.modules


def test_hotswapping_reached_and_unreached(tmp_path: Path):
    model = trained()
    model.save_pretrained(tmp_path / "part")
    whole = get_peft_model(base(), FPSConfig(budget=0.3, importance="magnitude")).eval()
    fill(whole, seed=7)
    whole.save_pretrained(tmp_path / "whole")
    x = normal(3, 8)
    expected = [model(x), whole(x)]
    hotswap_adapter(whole, tmp_path / "part", "default")
    torch.testing.assert_close(whole(x), expected[0])
    hotswap_adapter(model, tmp_path / "whole", "default")
    torch.testing.assert_close(model(x), expected[1])


# --- state dicts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["neuron", "layer", "model", "block", "row", "column"])
def test_a_state_dict_brings_its_sizes_into_a_fresh_model(granularity: str):
    torch.manual_seed(1)
    plain = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 4))
    options: dict[str, Any] = {"budget": 0.5, "granularity": granularity}
    model = get_peft_model(copy.deepcopy(plain), FPSConfig(**options))
    model.calibrate([normal(5, 8)], progress=False)
    fill(model)
    fresh = get_peft_model(copy.deepcopy(plain), FPSConfig(**options))
    fresh.load_state_dict(model.state_dict())
    fresh.train()(normal(3, 8)).sum().backward()  # it counts as calibrated: a warning would be an error
    torch.testing.assert_close(fresh.eval()(normal(3, 8)), model.eval()(normal(3, 8)), rtol=0, atol=0)


def test_a_state_dict_brings_what_was_not_reached():
    model = trained()
    fresh = get_peft_model(base(), FPSConfig(budget=0.3)).eval()
    fresh.load_state_dict(model.state_dict())
    assert sizes(fresh) == sizes(model)
    torch.testing.assert_close(fresh(normal(3, 8)), model(normal(3, 8)), rtol=0, atol=0)
    model.load_state_dict(get_peft_model(base(), FPSConfig(budget=0.3)).state_dict())
    assert sizes(model)["past"][1] == 8


def test_a_state_dict_that_does_not_fit_is_refused_by_torch_or_at_first_use():
    model = calibrated(base())
    state = model.state_dict()
    key = "base_model.model.used.fps_columns.default"
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(state | {key: state[key][:-1]})
    state = model.state_dict()
    model.load_state_dict(state | {key: torch.full_like(state[key], 99)})
    with pytest.raises(ValueError, match="used: adapter 'default': fps_columns"):
        model(normal(3, 8))
