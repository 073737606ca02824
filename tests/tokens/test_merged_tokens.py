"""A merged model goes on selecting tokens, says so, and has it again when it is loaded."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForImageClassification, ViTForMaskedImageModeling

import peft_fps
from peft_fps import FPSConfig
from peft_fps.tokens.merged_tokens import KEY
from tests.support.helpers import fill
from tests.tokens.vision_models import IMAGES, build, logits, timm_vit


def merged(name: str = "vit", message: str = "import peft_fps before the saved model is loaded") -> tuple[Any, Any]:
    """A merged model, and its outputs before merging."""
    model = get_peft_model(build(name), FPSConfig(per_neuron=1, token_keep_rate=0.5, token_blocks=[1, 3], seed=1))
    fill(model)
    before = logits(model.eval()(IMAGES)).detach()
    with pytest.warns(UserWarning, match=f"goes on selecting tokens .*0.5 in block 1, 0.5 in block 3.*{message}"):
        return model.merge_and_unload(), before


def test_the_setting_is_saved_with_the_merged_model_and_applied_on_loading(tmp_path: Path) -> None:
    model, before = merged()
    torch.testing.assert_close(logits(model(IMAGES)), before, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())[KEY] == {"1": 0.5, "3": 0.5}
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded(IMAGES)), logits(model(IMAGES)))
    peft_fps.set_token_keep_rate(loaded, 1.0)
    assert not torch.allclose(logits(loaded(IMAGES)), logits(model(IMAGES)), atol=1e-3)


def test_a_file_of_timm_does_not_say_so() -> None:
    model, before = merged("timm", "call peft_fps.select_tokens on the loaded model")
    torch.testing.assert_close(logits(model(IMAGES)), before, rtol=1e-4, atol=1e-4)
    fresh = build("timm")
    fresh.load_state_dict(model.state_dict())
    peft_fps.select_tokens(fresh, 0.5, [1, 3])
    assert torch.equal(logits(fresh(IMAGES)), logits(model(IMAGES)))


def test_merging_at_the_share_of_one_leaves_a_plain_model() -> None:
    model = get_peft_model(build("vit"), FPSConfig(per_neuron=1, token_keep_rate=0.5, token_blocks=[1]))
    model.set_token_keep_rate(1.0)
    plain = model.merge_and_unload()
    assert not hasattr(plain.config, KEY)
    assert not any(hasattr(module, "token_switch") for module in plain.modules())


def test_an_adapter_on_a_merged_model_leaves_its_setting() -> None:
    model, _ = merged()
    before = logits(model(IMAGES))
    again = get_peft_model(model, FPSConfig(per_neuron=1, importance="magnitude")).eval()
    assert torch.equal(logits(again(IMAGES)), before)
    assert torch.equal(logits(again.unload()(IMAGES)), before)


@pytest.mark.parametrize("rate", [None, 0.5])
def test_all_patches_stay_below_an_adapter_on_a_merged_model(rate: float | None) -> None:
    model, _ = merged()
    peft_fps.set_token_keep_rate(model, 1.0)
    whole = logits(model(IMAGES))
    peft_fps.set_token_keep_rate(model, 0.5)
    blocks = None if rate is None else [2]
    again = get_peft_model(
        model, FPSConfig(per_neuron=1, importance="magnitude", token_keep_rate=rate, token_blocks=blocks)
    ).eval()
    again.set_token_keep_rate(1.0)
    assert torch.equal(logits(again(IMAGES)), whole)
    plain = again.merge_and_unload()
    assert plain.config.fps_token_keep_rates == {}
    assert torch.equal(logits(plain(IMAGES)), whole)


def test_a_config_that_does_not_fit_is_named_when_it_is_read(tmp_path: Path) -> None:
    model, _ = merged()
    for noted in ({"9": 0.5}, {"1": 0.0}, [1]):
        setattr(model.config, KEY, noted)
        with pytest.warns(UserWarning, match=f"{KEY} in the config is not applied, so the model runs on all tokens"):
            loaded = type(model)(model.config)
        assert not any(hasattr(module, "token_switch") for module in loaded.modules())


def test_another_head_loses_the_setting_loudly() -> None:
    model, _ = merged()
    model.config.encoder_stride = 4
    with pytest.warns(UserWarning, match="ViTForMaskedImageModeling, which may read every patch"):
        loaded = ViTForMaskedImageModeling(model.config)
    assert not any(hasattr(module, "token_switch") for module in loaded.modules())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: peft_fps.select_tokens(m, 0.0, [1]), ValueError, "keep_rate is 0"),
        (lambda m: peft_fps.select_tokens(m, "all", [1]), TypeError, "keep_rate is 'all'"),
        (lambda m: peft_fps.select_tokens(m, 0.5, [7]), ValueError, r"token_blocks names \[7\]"),
        (lambda m: peft_fps.select_tokens(m, 0.5, [1, 1]), ValueError, "expected distinct indices"),
        (lambda m: peft_fps.set_token_keep_rate(m, 0.5), ValueError, "selects no tokens"),
        (lambda m: peft_fps.set_token_keep_rate(m, 2), ValueError, "between 0 and 1"),
        (
            lambda m: get_peft_model(m, FPSConfig(per_neuron=1)).set_token_keep_rate(0.5),
            ValueError,
            "without token selection",
        ),
    ],
)
def test_what_cannot_be_set_is_refused(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(timm_vit())
